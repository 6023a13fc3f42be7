"""Work in other threads with results in order, also where the host gives few threads or none."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tapfs.jobs.pipeline import in_order


@pytest.fixture(params=[0, 1, 2, None])
def threads_to_be_had(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many threads can be started, None: as many as are asked for."""
    left: int | None = request.param
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        nonlocal left
        if left == 0:
            raise RuntimeError("can't start new thread")
        if left is not None:
            left -= 1
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)


def working() -> list[threading.Thread]:
    """The threads of the pipeline that are still there."""
    return [thread for thread in threading.enumerate() if thread.name == "tapfs window"]


@pytest.mark.usefixtures("threads_to_be_had")
def test_results_come_in_order() -> None:
    assert list(in_order(range(100), lambda job: job * 2, workers=3, ahead=5)) == list(range(0, 200, 2))
    assert list(in_order([], lambda job: job, workers=3, ahead=5)) == []
    assert working() == []


@pytest.mark.usefixtures("threads_to_be_had")
def test_the_first_error_ends_it_and_nothing_runs_on() -> None:
    done: list[int] = []

    def work(job: int) -> int:
        if job == 3:
            raise ZeroDivisionError
        return job

    with pytest.raises(ZeroDivisionError):
        done.extend(in_order(range(100), work, workers=2, ahead=4))
    assert done == [0, 1, 2]
    assert working() == []


@pytest.mark.usefixtures("threads_to_be_had")
def test_a_caller_that_stops_early() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(100):
            taken.append(job)
            yield job

    results = in_order(jobs(), lambda job: job, workers=2, ahead=4)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(taken) <= 4
    assert working() == []
