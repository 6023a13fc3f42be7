"""From any two states a backend comes to rest, and a detach always ends."""

from __future__ import annotations

from itertools import product

import pytest

from tapfs.xen.device import State
from tapfs.xen.disk.backend_states import Ours, Seen, Step, next_step

SEEN = [Seen(*words) for words in product(State, State, (True, False))]
OURS = [Ours(*words) for words in product((True, False), repeat=3)]
CASES = list(product(SEEN, OURS))

#: A frontend that has nothing in our rings any more.
AWAY = (State.UNKNOWN, State.INITIALISING, State.INIT_WAIT, State.CLOSED)
USING = (State.INITIALISED, State.CONNECTED, State.CLOSING)


def after(step: Step, seen: Seen, ours: Ours) -> tuple[Seen, Ours] | None:
    """The states when the step has been taken; None: the device is done."""
    apart = ours._replace(connected=False, left=False)
    match step:
        case Step.CONNECT:
            state = seen.backend if seen.backend is State.CLOSING else State.CONNECTED
            return seen._replace(backend=state), ours._replace(connected=True, left=False)
        case Step.AWAIT_FRONTEND | Step.AWAIT_FRONTEND_SOON:
            return seen._replace(backend=State.INIT_WAIT), apart
        case Step.CLOSING:
            return seen._replace(backend=State.CLOSING), ours
        case Step.CLOSE:
            return seen._replace(backend=State.CLOSED), apart
        case Step.CLOSE_FOR_GOOD:
            return None
        case Step.NOTHING:
            return seen, ours


def rest(seen: Seen, ours: Ours) -> tuple[Seen, Ours] | None:
    """Where it comes to rest if nobody else does anything."""
    for _ in range(6):
        step = next_step(seen, ours)
        if step is Step.NOTHING:
            return seen, ours
        found = after(step, seen, ours)
        if found is None:
            return None
        seen, ours = found
    raise AssertionError(f"{seen} {ours} never comes to rest")


def test_it_always_comes_to_rest() -> None:
    for seen, ours in CASES:
        rest(seen, ours)


def test_nothing_is_connected_twice_or_while_paused() -> None:
    for seen, ours in CASES:
        if ours.connected or ours.paused:
            assert next_step(seen, ours) is not Step.CONNECT


def test_no_ring_outlives_its_frontend() -> None:
    for seen, ours in CASES:
        # A state that means nothing (0) in our own directory is for whoever wrote it to mend.
        if (
            seen.frontend in AWAY
            and (seen.online or seen.backend is State.CLOSING)
            and State.UNKNOWN < seen.backend < 7
        ):
            found = rest(seen, ours)
            assert found is None or not found[1].connected, (seen, ours)


def test_a_detach_ends_when_the_frontend_is_away() -> None:
    backends = (State.INIT_WAIT, State.CONNECTED, State.CLOSING, State.CLOSED)
    for ours, frontend, backend in product(OURS, AWAY, backends):
        assert rest(Seen(backend, frontend, online=False), ours) is None


def test_a_disk_whose_image_is_closed_can_only_end() -> None:
    for seen, ours in CASES:
        if seen.backend is not State.UNKNOWN:
            assert next_step(seen, ours._replace(closed=True)) is Step.CLOSE_FOR_GOOD


def test_a_detach_waits_for_a_frontend_that_uses_the_disk() -> None:
    for ours, frontend in product(OURS, USING):
        found = rest(Seen(State.CLOSING, frontend, online=False), ours)
        assert found is not None
        assert found[0].backend is State.CLOSING
        assert found[1].connected == ours.connected or ours.left


def test_a_refused_frontend_is_not_taken_up_before_it_has_closed() -> None:
    for frontend in USING:
        assert next_step(Seen(State.CLOSING, frontend, online=True), Ours()) is Step.NOTHING


@pytest.mark.parametrize("frontend", [State.INITIALISED, State.CONNECTED, State.CLOSING])
def test_a_successor_takes_up_what_was_left(frontend: State) -> None:
    for backend in (State.CONNECTED, State.CLOSING):
        assert next_step(Seen(backend, frontend, online=True), Ours(left=True)) is Step.CONNECT


def test_a_reboot_leads_to_a_new_connection() -> None:
    """Also when only every other state of the frontend is seen."""
    for seen_states in product((True, False), repeat=3):
        seen, ours = Seen(State.CONNECTED, State.CONNECTED, online=True), Ours(connected=True)
        for state, looks in zip((State.CLOSING, State.CLOSED, State.INITIALISING), seen_states, strict=True):
            seen = seen._replace(frontend=state)
            if looks:
                found = rest(seen, ours)
                assert found is not None
                seen, ours = found
        found = rest(seen, ours)
        assert found is not None
        assert found[0].backend is State.INIT_WAIT
        found = rest(found[0]._replace(frontend=State.INITIALISED), found[1])
        assert found == (Seen(State.CONNECTED, State.INITIALISED, online=True), Ours(connected=True))
