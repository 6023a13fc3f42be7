"""Snapshots of all disks of a guest at one moment.

Every disk is held at rest before the first snapshot is made, and let go after the last. A guest writes what depends on
an earlier write when that was answered. So where a disk has a write that came while others were held already, all
that this write depends on was answered before, and is in the snapshots. Together they are what a power failure leaves.

A hold ends by itself (`tapfs.xen.disk.held_at_rest`). If one has ended too early, or a snapshot fails, those that were
made are committed again, which leaves every disk as it was.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.device import Device, our_devices
from tapfs.xen.toolstack.control_client import ask

if TYPE_CHECKING:
    from tapfs.xen.xenstore.client import XenStore

#: Seconds for which a disk waits at most for the snapshots of the others.
_HOLD_SECONDS = 20


class Swapped(NamedTuple):
    """A disk, the name that what it held has now, and how many images its chain has."""

    device: Device
    file: str
    images: int


async def swap_all(store: XenStore, domain: int, suffix: str, *, freeze: str | None) -> list[Swapped]:
    """Take a snapshot of each disk of a domain that is written; its image gets its name with `suffix` behind it.

    `freeze` is a program that is run with `freeze` before and with `thaw` afterwards. Raises ImageError, and then all
    disks are as before.
    """
    devices = sorted(device for device in await our_devices(store) if device.domain == domain)
    states = {device: await ask(device, "status") for device in devices}
    written = {device: str(state["path"]) for device, state in states.items() if state["mode"] != "r"}
    if not written:
        raise ImageError(ErrorKind.NOT_FOUND, f"domain {domain} has no disk that tapfs serves and that it writes")
    made: list[Swapped] = []
    try:
        async with _frozen(freeze), _held(list(written)):
            for device, path in written.items():
                file = f"{_file_of(path)}{suffix}"
                answer = await ask(device, "swap", file=file)
                made.append(Swapped(device, file, int(answer["images"])))
    except BaseException:
        with trio.CancelScope(shield=True):
            for swapped in made:
                await ask(swapped.device, "commit")
        raise
    return made


def _file_of(path: str) -> str:
    """Where the image of a disk lies, which is elsewhere after a mirror: names pass on within a file system only."""
    return os.path.realpath(path) if os.path.isabs(path) else path


@asynccontextmanager
async def _held(devices: list[Device]) -> AsyncGenerator[None]:
    """All disks at rest meanwhile. Raises ImageError(io) if one of them did not stay so."""
    held: list[Device] = []
    early: list[Device] = []
    try:
        for device in devices:
            await ask(device, "hold", seconds=_HOLD_SECONDS)
            held.append(device)
        yield
    finally:
        with trio.CancelScope(shield=True):
            released = {device: await ask(device, "release") for device in held}
            early = [device for device, answer in released.items() if not answer["held"]]
    if early:
        raise ImageError(
            ErrorKind.IO,
            f"the snapshots took so long that {early[0]} went on before the last of them was made",
            op="swap",
            remedy="take snapshots of fewer disks at a time, or when the storage is less busy",
        )


@asynccontextmanager
async def _frozen(program: str | None) -> AsyncGenerator[None]:
    """The guest brought to rest by a program meanwhile, if there is one. Raises ImageError(io) if that fails."""
    if program is None:
        yield
        return
    await _run(program, "freeze")
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await _run(program, "thaw")


async def _run(program: str, word: str) -> None:
    try:
        done = await trio.run_process([program, word], check=False, capture_stderr=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ImageError(ErrorKind.IO, f"cannot be started: {error.strerror}", path=program, op=word) from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise ImageError(ErrorKind.IO, f"ended with status {done.returncode}: {said}", path=program, op=word)
