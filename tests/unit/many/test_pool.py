"""The pool: a task that hangs, dies or eats memory costs its own answer and no other."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from tapfs.many.pool import Pool
from tapfs.many.tasks import Answer, Limits
from tests.conftest import REPOSITORY

HANDLER = "tests.unit.many.misbehaving"


def run(words: Sequence[str], *, jobs: int = 1, together: int = 8, timeout: float = 60, **more: object) -> list[Answer]:
    tasks = [{"do": word, **more} for word in words]
    limits = Limits(timeout, cast("int | None", more.get("memory")), together)
    with Pool(HANDLER, limits, jobs=jobs) as pool:
        found = dict(pool.answers(tasks))
    assert sorted(found) == list(range(len(tasks)))
    return [found[number] for number in range(len(tasks))]


def kind(answer: Answer) -> object:
    return cast("dict[str, object]", answer["error"])["kind"] if "error" in answer else answer["result"]


def test_the_one_that_dies_or_hangs_is_blamed_and_no_other() -> None:
    words = ["a"] * 20
    words[3], words[9], words[10] = "die", "hang", "die"
    answers = run(words, together=8, timeout=0.3)
    expected = ["a"] * 20
    expected[3] = expected[10] = "worker_lost"
    expected[9] = "timeout"
    assert [kind(each) for each in answers] == expected
    assert "SIGSEGV" in str(answers[3])


def test_errors_bugs_and_chatter_are_answers() -> None:
    answers = run(["raise", "bug", "chatter", "a"])
    assert [kind(each) for each in answers] == ["corrupt", "bug", "chatter", "a"]
    assert cast("dict[str, object]", answers[0]["error"])["offset"] == 7


def test_memory_is_bounded() -> None:
    # More than the heap of a process that has run the whole suite may have free: that needs no leave of the host.
    answers = run(["eat", "a"], memory=64 << 20, bytes=2 << 30)
    assert [kind(each) for each in answers] == ["no_memory", "a"]
    assert [kind(each) for each in run(["eat"], bytes=256 << 20)] == [256 << 20]


def test_several_work_beside_each_other_and_are_gone_at_the_end() -> None:
    pids = {cast("int", answer["result"]) for answer in run(["pid"] * 40, jobs=3, together=1)}
    assert len(pids) > 1
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_with_threads_starts_its_workers_anew() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        assert [kind(each) for each in run(["a", "die"])] == ["a", "worker_lost"]
    finally:
        ended.set()
        thread.join()


def test_workers_end_with_who_was_killed() -> None:
    text = (
        "from tapfs.many.pool import Pool\nfrom tapfs.many.tasks import Limits\nimport os\n"
        f"with Pool({HANDLER!r}, Limits(), jobs=1) as pool:\n"
        "    for number, answer in pool.answers([{'do': 'pid'}, {'do': 'hang'}]):\n"
        "        print(answer['result'], flush=True)\n        os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    pid = int(done.stdout)
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # who is to reap it now is the host's
            return
        threading.Event().wait(0.01)
    raise AssertionError("the worker outlives its parent")
