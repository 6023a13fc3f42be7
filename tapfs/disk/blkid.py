"""Name file systems by libblkid, where the host has it: it knows many types that `tapfs.partitions` does not.

libblkid takes a descriptor. It gets an unnamed sparse file of the size of the disk, which holds the first
and the last MiB of the disk. The superblocks of all its types lie there. The library is part of util-linux,
so nearly every host has it; without it nothing more is named. It is loaded when it is first needed.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from tapfs.partitions.reader import Read
from tapfs.partitions.table import FileSystem

if TYPE_CHECKING:
    import ctypes  # where it is used: most disks are known or empty, and it takes 2 ms

_LIBRARY = "libblkid.so.1"

#: So much is copied of the start and of the end of a disk, and of one that has to be fetched.
_EDGES = (1 << 20, 1 << 20)
_FETCHED_EDGES = (256 << 10, 128 << 10)

_PIECE_BYTES = 64 << 10
#: A piece is compared with them: any() would take 10 ms for a MiB.
_ZEROS = bytes(max(_FETCHED_EDGES))

#: The facts of a superblock that are wanted: label, UUID, type.
_LABEL, _UUID, _TYPE = 1 << 1, 1 << 3, 1 << 5

#: Answers of blkid_do_safeprobe: one type was found, or several that exclude each other.
_ONE, _SEVERAL = 0, -2

#: More types than this are not listed of one place.
_MAX_TYPES = 8


def identify(read: Read, size: int, *, fetched: bool = False) -> list[FileSystem]:
    """The contents of a disk of `size` bytes; several only if libblkid cannot choose, none if it is not there.

    `fetched`: what is read comes over a network, so as little is read as most signatures need.

    Raises the ImageError that `read` meets.
    """
    start, end = _FETCHED_EDGES if fetched else _EDGES
    parts = [(at, data) for at, data in _pieces(read, size, start, end, whole=fetched) if data != _ZEROS[: len(data)]]
    if not parts:
        return []
    try:
        descriptor = os.memfd_create("tapfs-blkid", os.MFD_CLOEXEC)
    except OSError:
        return []
    try:
        os.ftruncate(descriptor, size)
        for at, data in parts:
            os.pwrite(descriptor, data, at)
        return identify_file(descriptor)
    except OSError:  # no memory, or a limit on the size of files
        return []
    finally:
        os.close(descriptor)


def _pieces(read: Read, size: int, start: int, end: int, *, whole: bool) -> Iterator[tuple[int, bytes]]:
    """The edges of the disk with their offsets, `whole` or in pieces: new memory for a MiB costs more than its read."""
    head = min(size, start)
    for first, stop in ((0, head), (max(head, size - end), size)):
        step = stop - first if whole else _PIECE_BYTES
        for at in range(first, stop, max(step, 1)):
            yield at, read(at, min(step, stop - at))


def identify_file(descriptor: int) -> list[FileSystem]:
    """The same of an open file or block device, which libblkid reads itself."""
    library = _loaded()
    if library is None:
        return []
    with _probe(library) as probe:
        if probe is None or library.blkid_probe_set_device(probe, descriptor, 0, 0) != 0:
            return []
        library.blkid_probe_set_superblocks_flags(probe, _LABEL | _UUID | _TYPE)
        outcome = library.blkid_do_safeprobe(probe)
        if outcome == _ONE:
            return _named(library, probe)
        found: list[FileSystem] = []
        if outcome == _SEVERAL:
            library.blkid_reset_probe(probe)
            while len(found) < _MAX_TYPES and library.blkid_do_probe(probe) == 0:
                found += _named(library, probe)
        return found


@contextmanager
def _probe(library: ctypes.CDLL) -> Generator[ctypes.c_void_p | None]:
    import ctypes

    pointer = library.blkid_new_probe()
    try:
        yield ctypes.c_void_p(pointer) if pointer else None
    finally:
        if pointer:
            library.blkid_free_probe(ctypes.c_void_p(pointer))


def _named(library: ctypes.CDLL, probe: ctypes.c_void_p) -> list[FileSystem]:
    """What the last probing has found, if that is more than nothing."""
    type_name, label, uuid = (_value(library, probe, name) for name in (b"TYPE", b"LABEL", b"UUID"))
    return [] if type_name is None else [FileSystem(type_name, label, uuid)]


def _value(library: ctypes.CDLL, probe: ctypes.c_void_p, name: bytes) -> str | None:
    import ctypes

    data, length = ctypes.c_char_p(), ctypes.c_size_t()
    if library.blkid_probe_lookup_value(probe, name, ctypes.byref(data), ctypes.byref(length)) != 0:
        return None
    return (data.value or b"").decode("utf-8", "replace").rstrip(" ") or None


@cache
def _loaded() -> ctypes.CDLL | None:
    """The library with the types of its functions; None where there is none that has them."""
    import ctypes

    try:
        library = ctypes.CDLL(_LIBRARY)
        library.blkid_new_probe.restype = ctypes.c_void_p
        library.blkid_free_probe.restype = None
        library.blkid_reset_probe.restype = None
        offset = ctypes.c_int64
        library.blkid_probe_set_device.argtypes = [ctypes.c_void_p, ctypes.c_int, offset, offset]
        library.blkid_probe_set_superblocks_flags.argtypes = [ctypes.c_void_p, ctypes.c_int]
        for function in (library.blkid_do_safeprobe, library.blkid_do_probe, library.blkid_reset_probe):
            function.argtypes = [ctypes.c_void_p]
        library.blkid_probe_lookup_value.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.POINTER(ctypes.c_size_t),
        ]
    except (OSError, AttributeError):
        return None
    return library
