"""Requests that Python answers are counted as those of the engine's front ends are."""

from __future__ import annotations

from contextlib import suppress

import pytest

from tapfs.kernel.metrics import BOUNDS_NS, KINDS
from tapfs.serving import counted_requests
from tapfs.serving.counted_requests import CountedRequests


@pytest.mark.parametrize("took", [0, 255, 256, 257, 511, 512, 10_000_000, 1 << 60])
def test_a_request_is_in_the_bucket_of_its_latency(took: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([7, 7 + took])
    monkeypatch.setattr(counted_requests.time, "perf_counter_ns", lambda: next(now))
    counted = CountedRequests()
    with counted.request("read") as request:
        request.bytes = 4096
    found = counted.metrics()
    assert found.keys() == set(KINDS)
    expected = next((number for number, bound in enumerate(BOUNDS_NS) if took < bound), len(BOUNDS_NS))
    assert [number for number, count in enumerate(found["read"].buckets) if count] == [expected]
    assert (found["read"].bytes, found["read"].nanoseconds, found["read"].requests) == (4096, took, 1)
    assert found["write"].requests == 0


def test_a_request_that_fails_is_an_error_and_moves_no_bytes() -> None:
    counted = CountedRequests()
    with suppress(OSError), counted.request("write") as request:
        request.bytes = 1
        raise OSError
    assert (counted.metrics()["write"].errors, counted.metrics()["write"].bytes) == (1, 0)
