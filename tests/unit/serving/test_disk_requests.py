"""Requests to a disk in use: each is done as it is said, and one that says too little or nonsense is an error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving import disk_requests
from tapfs.serving.live_jobs import LiveJobs
from tapfs.ublk import control as ublk_control

Answer = Callable[[Any, Mapping[str, Any]], Awaitable[Mapping[str, object]]]


async def of_device(operations: Any, request: Mapping[str, Any]) -> Mapping[str, object]:
    """The answer of the process of a block device, on which no job runs."""
    none: Any = None
    return await ublk_control.answer(operations, LiveJobs(operations, none, none, key_file=None), request)


both = pytest.mark.parametrize("answer", [disk_requests.answer, of_device])


class Operations:
    """The operations of a disk that note what they are asked for."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def __getattr__(self, name: str) -> Callable[..., Awaitable[int]]:
        async def operation(*words: object, **details: object) -> int:
            await trio.lowlevel.checkpoint()
            self.asked.append((name, *words, details))
            return 2

        return operation


def ask(answer: Answer, request: Mapping[str, Any]) -> tuple[Mapping[str, object], list[object]]:
    operations = Operations()
    return trio.run(answer, operations, request), operations.asked


@both
def test_a_request_does_what_it_says(answer: Answer) -> None:
    swap = {"command": "swap", "file": "/a", "keep_names": True, "size": 1 << 20}
    assert ask(answer, swap) == ({"images": 2}, [("swap", "/a", 1 << 20, {"keep_names": True})])
    assert ask(answer, {"command": "swap", "file": "/a"})[1] == [("swap", "/a", None, {"keep_names": False})]
    assert ask(answer, {"command": "resize", "size": None})[1] == [("resize", None, {"force": False})]
    assert ask(answer, {"command": "resize", "size": 512, "force": True})[1] == [("resize", 512, {"force": True})]
    assert ask(answer, {"command": "limit", "bytes": 0})[1] == [("limit", {"limit_bytes": 0, "limit_requests": None})]
    assert ask(answer, {"command": "pause"}) == ({}, [("pause", {})])
    assert ask(answer, {"command": "resume"}) == ({}, [("resume", {})])


def test_only_the_process_of_a_block_device_gives_its_users_errors_when_asked() -> None:
    assert ask(of_device, {"command": "give_up"}) == ({}, [("give_up", {})])
    with pytest.raises(ImageError, match="unknown command"):
        ask(disk_requests.answer, {"command": "give_up"})


def test_only_the_process_of_a_block_device_flushes_when_asked() -> None:
    assert ask(of_device, {"command": "flush"}) == ({}, [("flush", {})])
    with pytest.raises(ImageError, match="unknown command 'flush'"):
        ask(disk_requests.answer, {"command": "flush"})


@both
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"command": "swap"}, "needs a text as file"),
        ({"command": "swap", "file": None}, "needs a text as file"),
        ({"command": "swap", "file": 3}, "needs a text as file"),
        ({"command": "swap", "file": "/a", "size": "1M"}, "needs a number as size, not '1M'"),
        ({"command": "resize", "size": True}, "needs a number as size, not True"),
        ({"command": "resize", "size": -1}, "needs a number as size, not -1"),
        ({"command": "resize", "size": 1 << 63}, "needs a number as size"),
        ({"command": "resize", "size": 1.5}, "needs a number as size, not 1.5"),
        ({"command": "limit", "bytes": []}, r"needs a number as bytes, not \[\]"),
        ({"command": "limit", "requests": "1"}, "needs a number as requests"),
        ({"command": "format"}, "unknown command 'format'"),
        ({"command": ["pause"]}, "unknown command"),
        ({}, "unknown command None"),
    ],
)
def test_a_request_that_says_too_little_or_nonsense_is_an_error(
    answer: Answer, request_: Mapping[str, Any], message: str
) -> None:
    operations = Operations()
    with pytest.raises(ImageError, match=message) as met:
        trio.run(answer, operations, request_)
    assert met.value.kind in (ErrorKind.INVALID_FORMAT, ErrorKind.UNSUPPORTED)
    assert operations.asked == []
