"""A guest that connects in a loop is slowed down, any other is not."""

from __future__ import annotations

import pytest

from tapfs.xen.disk.step_rate import BURST, PER_SECOND, StepRate


def test_a_loop_is_answered_at_a_steady_rate() -> None:
    rate, now, steps = StepRate(), 100.0, 0
    while now < 160:
        now += rate.after_step(now) + 0.001
        steps += 1
    assert steps == pytest.approx(BURST + 60 * PER_SECOND, abs=3)


def test_reboots_never_wait() -> None:
    rate, now = StepRate(), 100.0
    for _ in range(20):
        for _ in range(8):
            assert rate.after_step(now) == 0
        now += 8 / PER_SECOND


def test_a_guest_that_behaves_again_is_forgiven() -> None:
    rate = StepRate()
    for _ in range(BURST + 10):
        rate.after_step(100.0)
    assert rate.after_step(100.0) > 0
    assert rate.after_step(200.0) == 0
