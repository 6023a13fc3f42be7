"""The control device of Linux' ublk driver: add a device, start it, hand it to a successor, stop it.

docs/specs/ublk.md, "Control commands" has numbers, layouts and the kernel that brought each. This module moves no data
and knows no image.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import time
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.kernel.ublk_server import Shape, control

CONTROL = Path("/dev/ublk-control")
SECTOR = 512

#: The names of the devices of a number.
_CHARACTER, _BLOCK = "/dev/ublkc{}", "/dev/ublkb{}"

#: Numbers of the control commands; each is encoded with the size of its structure, 32 bytes.
_ADD, _DELETE, _START, _STOP, _SET_PARAMETERS = 0x04, 0x05, 0x06, 0x07, 0x08
_START_RECOVERY, _END_RECOVERY = 0x10, 0x11
_GET_INFO, _GET_FEATURES, _UPDATE_SIZE = 0x02, 0x13, 0x15
_READS = {_GET_INFO, _GET_FEATURES}

_RECOVERY, _REISSUE, _ENCODED_COMMANDS = 1 << 3, 1 << 4, 1 << 6
#: Feature: the size of a device may change while it is used (Linux 6.16).
UPDATE_SIZE = 1 << 10
#: Flags of a device whose requests' pages are in the rings of its queues (Linux 6.16); what others must see or change
#: is copied by calls of the server.
_USER_COPY, _PAGES_IN_RINGS = 1 << 7, 1 << 11
ZERO_COPY = _USER_COPY | _PAGES_IN_RINGS

#: struct ublksrv_ctrl_dev_info.
_INFO = struct.Struct("=HHHHIIiIQQIIQQ")
#: struct ublk_params: length, types; basic; discard; the kernel adds what it knows behind.
_PARAMETERS = struct.Struct("=II IBBBBIIQQ IIIIHH")
_BASIC, _DISCARD = 1, 2
_READ_ONLY, _VOLATILE_CACHE, _FUA = 1, 4, 8

#: The most that one discard or zeroing asks for.
_MAX_DISCARD_SECTORS = (1 << 30) // SECTOR

_ANY_NUMBER = 0xFFFFFFFF
_PAUSE_SECONDS = 0.02


class State(IntEnum):
    """How a device stands: not started (or stopped), served, without a process, failing."""

    DEAD = 0
    LIVE = 1
    QUIESCED = 2
    FAILING = 3


class DeviceInfo(NamedTuple):
    """A device as the kernel has it."""

    number: int
    state: State
    shape: Shape
    #: The process that serves it, or did.
    pid: int
    #: The kernel moves what lies plainly in a file by itself.
    zero_copy: bool


class DiskShape(NamedTuple):
    """What a block device tells its users. Bytes; `granule`: what discards had better align to."""

    size: int
    writable: bool
    block: int
    granule: int


def character_device(number: int) -> str:
    """The device by which a server speaks with the kernel."""
    return _CHARACTER.format(number)


def block_device(number: int) -> str:
    """The device that users have."""
    return _BLOCK.format(number)


def require_ublk() -> None:
    """Raise ImageError(unsupported) where the running kernel has no ublk; its module is loaded if that goes."""
    if not CONTROL.exists():
        with suppress(OSError):
            subprocess.run(["modprobe", "-q", "ublk_drv"], check=False, capture_output=True)
    if not CONTROL.exists():
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "this kernel has no ublk (no /dev/ublk-control, and no module ublk_drv)",
            op="attach",
            remedy="use 'tapfs mount' for a file that shows the disk, or 'tapfs serve' for NBD clients",
        )


class Driver:
    """The open control device. Methods block, and raise ImageError."""

    def __init__(self) -> None:
        require_ublk()
        try:
            self._descriptor = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise from_os_error(error, path=str(CONTROL), op="open the control device") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it; devices stay."""
        os.close(self._descriptor)

    def features(self) -> int:
        """The features that this kernel knows, bit by bit; 0 where it cannot say (before Linux 6.5)."""
        buffer = bytearray(8)
        try:
            self._control(_GET_FEATURES, 0, buffer)
        except OSError:
            return 0
        return int.from_bytes(buffer, "little")

    def add(self, shape: Shape, *, zero_copy: bool) -> DeviceInfo:
        """A new device, not started. It keeps requests for a successor while nobody serves it.

        With `zero_copy`, and a kernel that has that, data goes past this process where it can.
        """
        flags = _RECOVERY | _REISSUE | _ENCODED_COMMANDS
        if zero_copy and self.features() & ZERO_COPY == ZERO_COPY:
            flags |= ZERO_COPY
        buffer = bytearray(
            _INFO.pack(
                shape.queues, shape.depth, 0, 0, shape.max_bytes, _ANY_NUMBER, os.getpid(), 0, flags, 0, 0, 0, 0, 0
            )
        )
        self._do("add a block device", _ADD, _ANY_NUMBER, buffer)
        return _info(buffer)

    def info(self, number: int) -> DeviceInfo | None:
        """A device as it is now; None: there is none of that number."""
        buffer = bytearray(_INFO.size)
        try:
            self._control(_GET_INFO, number, buffer)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise from_os_error(error, path=block_device(number), op="look at the device") from error
        return _info(buffer)

    def start(self, number: int, disk: DiskShape, shape: Shape) -> None:
        """Let users have the block device. All queues must be served already: its partitions are read by this."""
        parameters = bytearray(_parameters(disk, shape))
        self._do("describe the block device", _SET_PARAMETERS, number, parameters)
        self._do("start the block device", _START, number, bytearray(), os.getpid())

    def start_recovery(self, number: int, seconds: float) -> None:
        """Have a device await another process; the one before may take so long to let go of it."""
        give_up = time.monotonic() + seconds
        while True:
            try:
                self._control(_START_RECOVERY, number, bytearray())
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return  # a predecessor was killed behind this very step
                if error.errno != errno.EBUSY or time.monotonic() > give_up:
                    raise from_os_error(error, path=block_device(number), op="take over the device") from error
            else:
                return
            time.sleep(_PAUSE_SECONDS)

    def end_recovery(self, number: int) -> None:
        """Have users' requests come to this process, first those that its predecessor had not answered."""
        self._do("take over the device", _END_RECOVERY, number, bytearray(), os.getpid())

    def require_resizable(self) -> None:
        """Raise ImageError(unsupported) where the size of a device is fixed (before Linux 6.16)."""
        if not self.features() & UPDATE_SIZE:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "this kernel cannot change the size of a block device that is in use (Linux 6.16 can)",
                op="resize",
                remedy="detach it, resize the image, and attach it again",
            )

    def resize(self, number: int, size: int) -> None:
        """Tell users of another size."""
        self._do("resize the device", _UPDATE_SIZE, number, bytearray(), size // SECTOR)

    def stop(self, number: int) -> None:
        """Take the block device away. Its users get errors from now on, and its server's queues end."""
        self._do("stop the block device", _STOP, number, bytearray())

    def delete(self, number: int) -> None:
        """Remove a device. Waits until its character device is closed."""
        self._do("remove the block device", _DELETE, number, bytearray())

    def _do(self, op: str, command: int, number: int, buffer: bytearray, data: int = 0) -> None:
        path = str(CONTROL) if number == _ANY_NUMBER else block_device(number)
        try:
            self._control(command, number, buffer, data)
        except OSError as error:
            raise from_os_error(error, path=path, op=op) from error

    def _control(self, command: int, number: int, buffer: bytearray, data: int = 0) -> None:
        """A command in the encoding of ioctl(2): direction, 32 bytes, the letter u, the number."""
        direction = 2 if command in _READS else 3
        control(self._descriptor, direction << 30 | 32 << 16 | ord("u") << 8 | command, number, buffer, data)


def _info(buffer: bytearray) -> DeviceInfo:
    queues, depth, state, _, max_bytes, number, pid, _, flags, *_ = _INFO.unpack(buffer)
    return DeviceInfo(number, State(state), Shape(queues, depth, max_bytes), pid, bool(flags & _PAGES_IN_RINGS))


def _parameters(disk: DiskShape, shape: Shape) -> bytes:
    attributes = _VOLATILE_CACHE | _FUA if disk.writable else _READ_ONLY
    block = disk.block.bit_length() - 1
    most = _MAX_DISCARD_SECTORS if disk.writable else 0
    return _PARAMETERS.pack(
        _PARAMETERS.size,
        _BASIC | (_DISCARD if disk.writable else 0),
        attributes,
        block,
        max(block, 12),
        max(block, 12),
        max(block, 12),
        shape.max_bytes // SECTOR,
        0,
        disk.size // SECTOR,
        0,
        0,
        disk.granule,
        most,
        most,
        1,
        0,
    )
