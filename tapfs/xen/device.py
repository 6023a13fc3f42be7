"""A guest's disk as xenstore knows it: its number, its two directories, its states."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import ErrorKind, ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tapfs.xen.xenstore.client import Store, XenStore

#: Below `backend` of the domain that serves them: disks of `tapfs attach`, and those that libxl makes.
OUR_KIND = "tap"
LIBXL_KIND = "vbd"
#: Of Xen 4.19 and newer, with `backendtype=tap`.
LIBXL_TAP_KIND = "vbd3"
LIBXL_KINDS = (LIBXL_KIND, LIBXL_TAP_KIND)
#: The block script by which libxl's disks become ours.
BLOCK_SCRIPT = "block-tapfs"

DOMAINS = "/local/domain"

#: Characters of an error that go to xenstore, whose messages have 4096 bytes: a path alone may be that long.
_MAX_ERROR = 512

# The numbering of xen-vbd-interface(7): 1 << 28 | disk << 8 | partition, or major << 8 | disk << n | partition.
_EXTENDED = 1 << 28
_LARGEST = (2 << 28) - 1
_XVD_MAJOR = 202
_SD_MAJOR = 8
_HD_MAJORS = (3, 22)

_BACKEND = re.compile(rf"{DOMAINS}/([0-9]{{1,5}})/backend/({OUR_KIND}|{'|'.join(LIBXL_KINDS)})/[0-9]+/[0-9]+")

_NAME = re.compile(r"(xvd|sd|hd)([a-z]{1,5})([1-9][0-9]{0,2})?")
_NUMBERED = re.compile(r"d(0|[1-9][0-9]{0,6})(?:p(0|[1-9][0-9]{0,2}))?")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}|0[xX][0-9a-fA-F]{1,8}")


class State(IntEnum):
    """The states of a backend and a frontend (xenbus.h); UNKNOWN is also a missing or senseless one."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


def parse_state(text: str | None) -> State:
    """The state that a `state` key holds. A guest writes its own, so it may be anything."""
    if text is None or len(text) != 1 or text not in "012345678":
        return State.UNKNOWN
    return State(int(text))


def backends_of(domain: int) -> str:
    """The directory of all backends that a domain serves."""
    return f"{DOMAINS}/{domain}/backend"


class Device(NamedTuple):
    """One disk of a domain. `kind` is the directory below `backend/`: "tap" (ours), "vbd" or "vbd3" (made by libxl).

    `backend_domain` serves it: domain 0, or a driver domain.
    """

    kind: str
    domain: int
    number: int
    backend_domain: int = 0

    @property
    def backend(self) -> str:
        """The backend's directory."""
        return f"{backends_of(self.backend_domain)}/{self.kind}/{self.domain}/{self.number}"

    @property
    def frontend(self) -> str:
        """The frontend's directory."""
        return f"{DOMAINS}/{self.domain}/device/vbd/{self.number}"

    @property
    def made_by_libxl(self) -> bool:
        """Whether libxl made its directories, with our block script."""
        return self.kind in LIBXL_KINDS

    @property
    def name(self) -> str:
        """As the guest is likely to call it: "xvda"."""
        return vdev_name(self.number)

    @property
    def key(self) -> str:
        """What it is called in file names; no two disks of a host share it."""
        return f"{self.domain}-{self.number}"

    def __str__(self) -> str:
        return f"domain {self.domain} {self.name}"


def parse_vdev(text: str) -> int:
    """The number of a virtual disk: "xvda", "xvda1", "sda", "hda", "d0p1", with or without /dev/, or the number itself.

    Raises ImageError(invalid_argument).
    """
    name = text.removeprefix("/dev/")
    if match := _NAME.fullmatch(name):
        number = _number(match[1], _disk_of(match[2]), int(match[3] or 0))
    elif match := _NUMBERED.fullmatch(name):
        number = _number("xvd", int(match[1]), int(match[2] or 0))
    elif _NUMBER.fullmatch(text):
        number = int(text, 0)
    else:
        number = None
    if number is None or number > _LARGEST:
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            f"{text!r} is no name of a virtual disk",
            op="parse",
            remedy="use xvda, xvda1, sda, hda or a number such as 51712",
        )
    return number


def vdev_name(number: int) -> str:
    """The name of a number, such that `parse_vdev` makes it the number again; the number itself where it has none."""
    major, minor = number >> 8, number & 0xFF
    if number >> 28 == 1:
        disk, partition = number >> 8 & 0xFFFFF, minor
        # With a smaller number of its own this one is not the one that the name stands for.
        named = disk > 15 or partition > 15
        return _spell("xvd", disk, partition) if named else str(number)
    if major == _XVD_MAJOR:
        return _spell("xvd", minor >> 4, minor & 15)
    if major == _SD_MAJOR:
        return _spell("sd", minor >> 4, minor & 15)
    if major in _HD_MAJORS and minor < 128:
        return _spell("hd", 2 * _HD_MAJORS.index(major) + (minor >> 6), minor & 63)
    return str(number)


async def find_domain(store: Store, text: str) -> int:
    """The number of a domain given by number or name. Raises ImageError(not_found).

    A driver domain knows its guests by number alone: xenstore shows it neither their names nor whether they are there.
    """
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else None
    if await store.own_domain() != 0:
        if number is not None:
            return number
        raise ImageError(
            ErrorKind.NOT_FOUND,
            f"a driver domain is not told which domain is {text!r}",
            op="find",
            remedy="say its number: `xl domid NAME` in domain 0",
        )
    if number is not None and await store.read(f"{DOMAINS}/{number}") is not None:
        return number
    for entry in await store.list(DOMAINS):
        if entry.isdigit() and await store.read(f"{DOMAINS}/{entry}/name") == text:
            return int(entry)
    raise ImageError(
        ErrorKind.NOT_FOUND, f"there is no domain {text!r}", op="find", remedy="`xl list` shows all domains"
    )


async def with_names(store: Store, device: Device) -> str:
    """How the log calls a disk: "domain 7 xvda (web1, UUID)", for the number of a domain is another after a reboot."""
    path = f"{DOMAINS}/{device.domain}"
    machine = await store.read_if_shown(f"{path}/vm") or ""
    names = [await store.read_if_shown(f"{path}/name"), machine.rpartition("/")[2]]
    known = ", ".join(filter(None, names))
    return f"{device} ({known})" if known else str(device)


async def our_devices(store: Store) -> list[Device]:
    """All disks that tapfs is to serve here: all of this domain's `backend/tap`, and those of libxl with our script."""
    own = await store.own_domain()
    found = await devices_of_kind(store, OUR_KIND, own)
    for kind in LIBXL_KINDS:
        found += [device for device in await devices_of_kind(store, kind, own) if await is_ours(store, device)]
    return found


def device_at(path: str, backend_domain: int) -> Device | None:
    """The device that a key belongs to, of those that a domain serves; None: it is above the devices."""
    parts = path.removeprefix(f"{backends_of(backend_domain)}/").split("/")
    if len(parts) < 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    return Device(parts[0], int(parts[1]), int(parts[2]), backend_domain)


async def devices_of_kind(store: Store, kind: str, backend_domain: int) -> list[Device]:
    """All disks of one kind that a domain serves, by tapfs or by others."""
    found: list[Device] = []
    place = f"{backends_of(backend_domain)}/{kind}"
    for domain in _numbers(await store.list(place)):
        numbers = _numbers(await store.list(f"{place}/{domain}"))
        found += [Device(kind, domain, number, backend_domain) for number in numbers]
    return found


async def domains(store: Store) -> list[int]:
    """The numbers of all domains. Domain 0 may ask."""
    return _numbers(await store.list(DOMAINS))


async def our_device_elsewhere(store: Store, domain: int, number: int) -> Device | None:
    """The disk of a domain that the tapfs of a driver domain serves, as domain 0 sees it; None: there is none."""
    frontend = Device(OUR_KIND, domain, number).frontend
    match = _BACKEND.fullmatch(await store.read_if_shown(f"{frontend}/backend") or "")
    if match is None or match[1] == str(await store.own_domain()):
        return None
    device = Device(match[2], domain, number, int(match[1]))
    return device if await is_ours(store, device) else None


async def guest_lives(store: Store, device: Device) -> bool:
    """Whether the domain of a disk is there. A driver domain sees no more of it than the frontend's directory."""
    if device.backend_domain == 0:
        return await store.read(f"{DOMAINS}/{device.domain}") is not None
    return await store.read_if_shown(f"{device.frontend}/backend") == device.backend


async def is_ours(store: Store, device: Device) -> bool:
    """Whether a device is there and to be served by us: ours by its kind, or libxl's with our script."""
    if not device.made_by_libxl:
        return await store.read(f"{device.backend}/state") is not None
    script = await store.read(f"{device.backend}/script")
    return script is not None and script.rpartition("/")[2] == BLOCK_SCRIPT


async def write_device_keys(
    store: XenStore,
    device: Device,
    values: Mapping[str, str | int | None],
    *,
    only_at: State | None = None,
    token: str | None = None,
) -> bool:
    """Write keys below the backend's directory (None: remove) in one transaction; False if the device is gone.

    The keys are left alone, too, where the backend is not at the state `only_at`, and where another `token` stands in
    `tapfs/token`: another device of the same number has taken the directory. A key that is written too late would
    bring back a part of a directory that was removed.
    """

    async def write(keys: Store) -> bool:
        state = await state_of(keys, device, token=token)
        if state is None or only_at not in (None, state):
            return False
        await write_keys(keys, device, values)
        return True

    return await store.transact(write)


def shown_error(error: ImageError | str) -> str:
    """An error as xenstore is to hold it."""
    return str(error)[:_MAX_ERROR]


def error_keys(error: ImageError) -> dict[str, str | int | None]:
    """What tells `tapfs list` and the toolstack what is wrong with a disk."""
    return {"tapfs/error": shown_error(error), "tapfs/error-kind": error.kind.value}


async def state_of(store: Store, device: Device, *, token: str | None = None) -> State | None:
    """The backend's state; None if the device is gone: it has no state, or, of one with a `token`, not that token."""
    text = await store.read(f"{device.backend}/state")
    if token is None:
        return None if text is None else parse_state(text)
    return parse_state(text) if await store.read(f"{device.backend}/tapfs/token") == token else None


async def write_keys(keys: Store, device: Device, values: Mapping[str, str | int | None]) -> None:
    """Write keys below the backend's directory (None: remove) within a transaction that has seen the device."""
    for name, value in values.items():
        if value is None:
            await keys.remove(f"{device.backend}/{name}")
        else:
            await keys.write(f"{device.backend}/{name}", value)


def _numbers(names: list[str]) -> list[int]:
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _number(prefix: str, disk: int, partition: int) -> int | None:
    """The number of a disk or partition by the names' families; None where it has none."""
    if prefix == "xvd" and disk <= 15 and partition <= 15:
        return _XVD_MAJOR << 8 | disk << 4 | partition
    if prefix == "xvd" and disk < 1 << 20 and partition <= 255:
        return _EXTENDED | disk << 8 | partition
    if prefix == "sd" and disk <= 15 and partition <= 15:
        return _SD_MAJOR << 8 | disk << 4 | partition
    if prefix == "hd" and disk <= 3 and partition <= 63:
        return _HD_MAJORS[disk // 2] << 8 | disk % 2 << 6 | partition
    return None


def _disk_of(letters: str) -> int:
    """0 for "a", 25 for "z", 26 for "aa"."""
    disk = 0
    for letter in letters:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    return disk - 1


def _spell(prefix: str, disk: int, partition: int) -> str:
    letters = ""
    rest = disk + 1
    while rest:
        rest, digit = divmod(rest - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return f"{prefix}{letters}{partition or ''}"
