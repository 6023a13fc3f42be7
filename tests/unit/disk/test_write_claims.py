"""The claims of writers on ranges of a disk, and the commits that they have missed."""

from __future__ import annotations

import random
import threading

import pytest

from tapfs.disk.write_claims import Claim, Claims, overlap
from tapfs.extent import Range


def some_ranges(choice: random.Random) -> list[Range]:
    ends = sorted(choice.sample(range(60), 2 * choice.randrange(1, 6)))
    return [Range(start, end - start) for start, end in zip(ends[::2], ends[1::2], strict=True)]


def test_lists_overlap_where_one_of_their_bytes_is_the_same() -> None:
    choice = random.Random(9)
    seen = {False: 0, True: 0}
    for _ in range(3000):
        left, right = some_ranges(choice), some_ranges(choice)
        bytes_ = {at for offset, length in left for at in range(offset, offset + length)}
        expected = any(at in bytes_ for offset, length in right for at in range(offset, offset + length))
        assert overlap(left, right) == expected
        seen[expected] += 1
    assert min(seen.values()) > 100
    assert not overlap([], [Range(0, 5)])
    assert not overlap([Range(0, 5)], [])


def test_a_writer_waits_for_any_of_its_ranges() -> None:
    lock = threading.Lock()
    claims = Claims(lock)
    held = Claim()
    held.ranges = [Range(0, 10), Range(100, 10)]
    with lock:
        claims.hold(held)
        assert not claims.wait_until_free([Range(10, 90), Range(110, 5)])
    waited: list[bool] = []

    def wait() -> None:
        with lock:
            waited.append(claims.wait_until_free([Range(50, 5), Range(109, 1)]))

    thread = threading.Thread(target=wait)
    thread.start()
    while True:  # until it waits, for it has the lock till then
        with lock:
            if claims._changed._waiters:  # type: ignore[attr-defined]
                assert waited == []
                claims.let_go(held)
                break
    thread.join()
    assert waited == [True]
    with lock:
        claims.let_go(held)  # a second time, of no effect


@pytest.mark.parametrize("commits", [0, 1, 63, 64, 65, 200])
def test_a_writer_that_has_missed_too_many_commits_looks_again(commits: int) -> None:
    claims = Claims(threading.Lock())
    claims.committed([Range(0, 10)])
    seen = claims.commits
    for number in range(commits):
        claims.committed([Range(100 * number, 10), Range(100 * number + 50, 10)])
    assert not claims.changed_since(claims.commits, [Range(0, 1 << 40)])
    assert claims.changed_since(seen, [Range(10, 40), Range(60, 40)]) == (commits > 64)
    assert claims.changed_since(seen, [Range(45, 6)]) == (commits > 0)
