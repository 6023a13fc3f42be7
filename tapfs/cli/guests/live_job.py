"""Commands that do a long job on a disk in use: they start it, show how far it is, and end it when they are ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tapfs.cli.guests.device import find_named_device, with_xenstore

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from tapfs.xen.host import Host
    from tapfs.xen.xenstore.client import XenStore

#: Seconds between two looks at how far it is.
_LOOK_SECONDS = 0.25


def do_live_job(
    arguments: argparse.Namespace, command: str, progress: Callable[[int, int], None], **details: object
) -> dict[str, Any]:
    """Have the process of the named disk do a job; its answer. A signal ends the job. Raises ImageError."""
    if arguments.ublk is not None:
        return _of_block_device(arguments.ublk, command, progress, details)

    async def work(store: XenStore, _host: Host) -> dict[str, Any]:
        import trio

        from tapfs.xen.toolstack.control_client import ask

        device = await find_named_device(store, arguments)

        async def look() -> None:
            while True:
                await trio.sleep(_LOOK_SECONDS)
                found = await ask(device, "job")
                _show(command, found, progress)

        answer: dict[str, Any] = {}

        async def do() -> None:
            try:
                answer.update(await ask(device, command, **details))
            except trio.Cancelled:
                with trio.CancelScope(shield=True):
                    await ask(device, "cancel")
                raise
            looking.cancel_scope.cancel()

        async with trio.open_nursery() as looking:
            looking.start_soon(do)
            looking.start_soon(look)
        return answer

    return with_xenstore(work)


def _of_block_device(
    text: str, command: str, progress: Callable[[int, int], None], details: dict[str, object]
) -> dict[str, Any]:
    """The same of a block device: a thread waits for the answer, this one looks, and heeds signals."""
    from concurrent.futures import ThreadPoolExecutor, wait

    from tapfs.ublk import attaching

    number = attaching.device_number(text)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(attaching.ask, number, command, details)
        try:
            while not wait([answer], _LOOK_SECONDS).done:
                _show(command, attaching.ask(number, "job"), progress)
        except BaseException:
            if not answer.done():
                attaching.ask(number, "cancel")
            raise
        return answer.result()


def _show(command: str, found: dict[str, Any], progress: Callable[[int, int], None]) -> None:
    if found.get("job") == command and "size" in found:
        left = found["size"] - found["offset"] + found["left_bytes"]
        progress(max(0, found["size"] - left), found["size"])
