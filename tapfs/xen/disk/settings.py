"""Read the settings of a disk from xenstore: the image, the mode, limits, whether the disk is paused.

The toolstack and our own commands write these keys. So a key that makes no sense is an error for the operator.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.location import locate
from tapfs.records import dataclass
from tapfs.serving.held_requests import WAIT_ON
from tapfs.xen.specification import DEFAULT_MEMORY, DiskSpecification, parse_mode, parse_specification

if TYPE_CHECKING:
    from tapfs.xen.device import Device

#: Descriptors it may have open unless `tapfs/open-files` says otherwise: a long chain, its rings, its control socket.
DEFAULT_OPEN_FILES = 1024

_GRANTS = ("copy", "map", "persistent")
_LARGEST = (1 << 63) - 1


class Keys(Protocol):
    """The keys of xenstore."""

    async def read(self, path: str) -> str | None:
        """The value of a key; None if it is not there."""
        ...


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """A disk as its keys describe it.

    `specification`: the image, with the format that `-f` gave. `backing_formats`: of its parents, nearest first.
    `mode`: "r", "w" or "w!". `write_base`: though overlays lie over the image. `discard`: the
    guest may discard. `grants`: how data is to come from the guest, None for the best that it offers. `wait_on`: the
    errors that the guest is not told of (`held_requests`).
    `key_files`: FILE or IMAGE=FILE, with passwords.
    `cache_bytes`: the bound of the map cache, None for the default.
    `paused`, the limits (per second, 0 for none) and what the process may take (`nice` None: leave it) are as they were
    left, by whichever process.
    """

    specification: DiskSpecification
    mode: str
    backing_formats: tuple[str, ...] = ()
    key_files: tuple[str, ...] = ()
    grants: str | None = None
    wait_on: str = WAIT_ON[0]
    removable: bool = False
    cdrom: bool = False
    paused: bool = False
    limit_bytes: int = 0
    limit_requests: int = 0
    cache_bytes: int | None = None
    nice: int | None = None
    memory: int = DEFAULT_MEMORY
    open_files: int = DEFAULT_OPEN_FILES
    write_base: bool = False
    discard: bool = True


async def read_settings(store: Keys, device: Device) -> DiskSettings:
    """The settings now. Raises ImageError: not_found if the device is gone, invalid_format naming the key."""

    async def read(name: str) -> str | None:
        return await store.read(f"{device.backend}/{name}")

    if await read("state") is None:
        raise ImageError(ErrorKind.NOT_FOUND, "is gone", path=device.backend, op="read the settings")
    specification = _specification(device, await read("params"), await read("tapfs/spec"))
    if specification.format is None:
        specification = specification._replace(format=await read("tapfs/format") or None)
    if await read("tapfs/direct") == "1":
        specification = specification._replace(direct=True)
    options = dict(specification.options)

    async def option(name: str) -> str | None:
        """An option of the disk: of `tapfs attach`, or else of the disk string itself."""
        return await read(f"tapfs/{name}") or options.get(name)

    async def number(name: str, least: int = 0, most: int = _LARGEST) -> int | None:
        return _number(f"{device.backend}/tapfs/{name}", await option(name), least, most)

    grants = await option("grants") or None
    if grants is not None and grants not in _GRANTS:
        raise _senseless(f"{device.backend}/tapfs/grants", grants, f"one of {', '.join(_GRANTS)}")
    wait_on = await option("wait-on") or WAIT_ON[0]
    if wait_on not in WAIT_ON:
        raise _senseless(f"{device.backend}/tapfs/wait-on", wait_on, f"one of {', '.join(WAIT_ON)}")
    return DiskSettings(
        specification,
        _mode(await read("mode") or "r", specification.mode),
        backing_formats=_backing_formats(
            specification.path, await option("backing-formats") or "", await read("tapfs/swap") or ""
        ),
        write_base=await option("write-base") == "1",
        discard=await read("discard-enable") != "0",
        key_files=await _key_files(read, specification),
        grants=grants,
        wait_on=wait_on,
        removable=await read("removable") == "1",
        cdrom=await read("device-type") == "cdrom",
        paused=await read("tapfs/paused") == "1",
        limit_bytes=await number("limit-bytes") or 0,
        limit_requests=await number("limit-requests") or 0,
        cache_bytes=await number("cache"),
        nice=await number("nice", -20, 19),
        memory=await number("memory", 1) or DEFAULT_MEMORY,
        open_files=await number("open-files", 1) or DEFAULT_OPEN_FILES,
    )


def _specification(device: Device, said: str | None, served: str | None) -> DiskSpecification:
    """The image that is `served`, if another than the toolstack has `said`, with all else that the toolstack said."""
    if not (said or served):
        raise ImageError(ErrorKind.INVALID_FORMAT, "names no image", path=f"{device.backend}/params", op="parse")
    if not served:
        return parse_specification(said or "")
    image = parse_specification(served)
    if not said:
        return image
    first = parse_specification(said)
    # The formats of the parents are noted with the image.
    options = tuple(option for option in first.options if option[0] != "backing-formats")
    return image._replace(direct=first.direct or image.direct, mode=first.mode, options=options)


async def _key_files(read: Callable[[str], Awaitable[str | None]], specification: DiskSpecification) -> tuple[str, ...]:
    """Those of `tapfs attach`, one a line, or else those of the disk string."""
    noted = await read("tapfs/key-file")
    if noted:
        return tuple(filter(None, noted.split("\n")))
    return tuple(value for name, value in specification.options if name == "key-file")


def _mode(said: str, widened: str | None) -> str:
    """The mode of the device. xl knows no w!, so the disk string can widen a w to that, and never an r."""
    mode = parse_mode(said)
    return "w!" if mode == "w" and widened == "w!" else mode


def _backing_formats(path: str, noted: str, swapped: str) -> tuple[str, ...]:
    """The formats of the parents: those that a swap has noted, if its overlay has got the name (`swap_note`)."""
    file, _, formats = swapped.partition(" ")
    identity = locate(path).identity()
    if identity is not None and file == f"{identity[0]}:{identity[1]}":
        noted = formats
    return tuple(filter(None, noted.split(",")))


def _number(path: str, text: str | None, least: int, most: int) -> int | None:
    if text is None or text == "":
        return None
    digits = text.removeprefix("-") if least < 0 else text
    value = int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None
    if value is None or not least <= value <= most:
        raise _senseless(path, text, f"a number from {least} to {most}")
    return value


def _senseless(path: str, text: str, wanted: str) -> ImageError:
    return ImageError(ErrorKind.INVALID_FORMAT, f"holds {text!r}, not {wanted}", path=path, op="parse")
