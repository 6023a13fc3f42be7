"""Salvages a VDI whose header is lost: the map of blocks is found by what it must be, and the header follows from it.

A block says nothing of its place on the disk, so that without the map nothing is to be had. The map names each slot of
the file once, and a writer gives slots in their order. So a map has all numbers from 0 on, each once, and its end is
where one comes again, as in the zeros behind it.
"""

from __future__ import annotations

from tapfs.driver import HostFile, Salvage, SalvageRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import decode
from tapfs.formats.rounding import round_up
from tapfs.formats.vdi.header import HEAD_BYTES, SECTOR, VERSION, Header, Type, parse_header
from tapfs.formats.vdi.reader import FREE, ZERO
from tapfs.plan import Write, plan
from tapfs.records import NamedTuple

#: The block of VirtualBox, QEMU and tapfs.
_BLOCK_BYTES = 1 << 20
#: The places of the map: behind the header, or at 1 MiB.
_PLACES = (512, 1 << 20)
_ALIGNMENT = 1 << 20
#: A disk of 32 TiB has so many bytes of map.
_MOST_MAP_BYTES = 128 << 20
_TEXT = b"<<< image >>>\n"


class _Map(NamedTuple):
    """A map that was found: its place, the blocks that it has, and the slots that they name."""

    place: int
    blocks: int
    slots: int

    @property
    def end(self) -> int:
        """The host offset behind it."""
        return self.place + 4 * self.blocks


def salvage(file: HostFile, request: SalvageRequest) -> Salvage:
    """See :meth:`tapfs.salvage.SalvageableFormat.salvage`."""
    try:
        parse_header(file.read(0, HEAD_BYTES), file)
    except ImageError as error:
        wrong = error.message
    else:
        return Salvage()
    if request.backing is not None:
        message = "a VDI names its parent by a UUID, which is lost with the header: salvage the image alone"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, op="salvage")
    block = request.cluster_bytes or _BLOCK_BYTES
    maps = (_map_at(file, place, block) for place in _PLACES)
    found = max((each for each in maps if each is not None), key=lambda each: each.slots, default=None)
    if found is None:
        message = f"has no map of blocks of {block} bytes, and a block does not say where on the disk it belongs"
        raise ImageError(ErrorKind.INVALID_FORMAT, message, path=file.path, op="salvage")
    doubts: list[str] = []
    data = file.size() - found.slots * block
    if data % SECTOR or not found.end <= data <= round_up(found.end, _ALIGNMENT):
        data = round_up(found.end, _ALIGNMENT if found.place == _ALIGNMENT else SECTOR)
        doubts.append(f"the file was cut, or something stands behind its blocks: they are taken to begin at {data:#x}")
    size = found.blocks * block
    if request.virtual_size is None:
        doubts.append(f"the disk is taken as {size} bytes, all blocks of the map: it may end within the last one")
    elif not size - block < request.virtual_size <= size:
        message = f"a disk of {request.virtual_size} bytes does not have the {found.blocks} blocks of the map"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=file.path, op="salvage")
    else:
        size = request.virtual_size
    doubts.append("whether it had a parent stood in the header: blocks that it does not have read as zeros")
    header = Header(VERSION, Type.DYNAMIC, size, block, found.blocks, found.slots, found.place, data)
    rebuilt = f"the header, which cannot be used ({wrong}), by the map of {found.blocks} blocks at {found.place:#x}"
    return Salvage(plan([Write(0, 0, header.pack(_TEXT))]), (rebuilt,), tuple(doubts))


def _map_at(file: HostFile, place: int, block: int) -> _Map | None:
    """The map that begins at a place, None if what stands there is none."""
    most = min(_MOST_MAP_BYTES, file.size() - place) // 4 * 4
    if most <= 0:
        return None
    # No slot lies behind the end of the file, but for those that were cut off.
    bound = 2 * (file.size() // block + 1)
    seen = bytearray(bound)
    blocks = slots = 0
    for entry in decode(file.read(place, most), "I", "little"):
        if entry not in (FREE, ZERO):
            if entry >= bound or seen[entry]:
                break
            seen[entry] = 1
            slots += 1
        blocks += 1
    # Slots are given in their order, so one that is missing means that this is no map, or not all of it. One zero with
    # zeros behind it may be anything.
    return _Map(place, blocks, slots) if slots and blocks > 1 and not any(seen[slots:]) else None
