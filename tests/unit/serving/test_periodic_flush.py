"""The periodic flush of a service. That it is tried again after each error is in test_service.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.lowlevel
import trio.testing

from tapfs import Image
from tapfs.serving import periodic_flush
from tapfs.serving.periodic_flush import flush_periodically
from tapfs.serving.worker import Worker


async def test_the_flush_is_not_beside_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flush of an image that has been swapped away would clear the plan of the one in its place."""
    monkeypatch.setattr(periodic_flush, "_FLUSH_SECONDS", 0)
    flushed: list[str] = []

    def image(name: str) -> Image:
        return cast("Image", SimpleNamespace(writable=True, unflushed_bytes=1, flush=lambda: flushed.append(name)))

    served = image("old")
    changing = trio.Lock()

    async def flush() -> None:
        await flush_periodically(lambda: served, Worker(), alone=changing, path="disk")

    async with trio.open_nursery() as nursery:
        async with changing:
            nursery.start_soon(flush)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert flushed == []
            served = image("new")
        while not flushed:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert set(flushed) == {"new"}
