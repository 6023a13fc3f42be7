"""An open LUKS container: its payload is the disk, encrypted by sector and written in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tapfs.driver import Cryptography, HostFile, Identity, Operation, Placement, Reservation, SlotChange
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, Range
from tapfs.formats.luks.signature import MAGIC, VERSION_1, VERSION_2
from tapfs.formats.luks.version1 import read_version1
from tapfs.formats.luks.version2 import read_version2
from tapfs.formats.luks.volume import SECTOR, Volume, unlock
from tapfs.formats.raw import MAX_SIZE, IdentityDriver
from tapfs.plan import Grow, Plan, Shorten, plan
from tapfs.records import replace


class LuksDriver(IdentityDriver):
    """A LUKS container: a :class:`tapfs.driver.WritableDriver` that never changes the headers.

    Its disk goes on to the end of the file, unless the header of version 2 says where the disk ends.
    """

    def __init__(self, file: HostFile, grown_size: int | None = None) -> None:
        self._volume = _volume(file)
        start, cipher = self._volume.payload_offset, self._volume.cipher
        super().__init__(file, "luks", size=_payload_bytes(self._volume, file) if grown_size is None else grown_size)
        self.geometry = replace(
            self.geometry,
            granule=cipher.sector_bytes,
            identity=Identity(0, start),
            cipher=cipher,
            # Half a sector of the cipher cannot be written: to the guest it is the sector of the disk.
            sector_size=cipher.sector_bytes if cipher.sector_bytes > SECTOR else None,
        )
        self._start = start

    def map(self, offset: int, length: int) -> list[Extent]:
        """One DATA extent: a hole of the host file does not read as zeros."""
        return [Extent(offset, length, Kind.DATA, host_offset=self._start + offset, in_place=True)]

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """None: everything is data."""
        del offset, end
        return None

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """Every byte has its place already."""
        placements = (Placement(offset, length, self._start + offset, in_place=True) for offset, length in ranges)
        return Reservation(tuple(ranges), operation, tuple(placements))

    def make_room(self, size: int) -> Iterator[Plan]:
        """Nothing. Raises ImageError(unsupported, out_of_bounds) for a size that the container cannot have."""
        self._require(size)
        return iter(())

    def resize(self, size: int) -> Iterator[Plan]:
        """Give the file the length that the disk of this size has; what it gains is zeroed by who has the key."""
        self._require(size)
        end = self._start + size
        return iter([plan([Grow(0, end) if size > self.geometry.virtual_size else Shorten(0, end)])])

    def _require(self, size: int) -> None:
        sector = self._volume.cipher.sector_bytes
        if self._volume.payload_bytes is not None:
            message = "the header of version 2 says how long the disk is, and tapfs does not change that header"
            remedy = "cryptsetup resize and cryptsetup reencrypt do"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self._file.path, op="resize", remedy=remedy)
        if size < 0 or size % sector or self._start + size > MAX_SIZE:
            message = f"a disk of {size} bytes is none of whole sectors of {sector} bytes"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=self._file.path, op="resize")

    @property
    def plain_details(self) -> frozenset[str]:
        """What an operator may have chosen, or must know."""
        return frozenset({"version", "cipher", "key_bits", "uuid", "label", "slots", "header_fault"})

    def details(self) -> Mapping[str, object]:
        """The header in words, without a secret."""
        return self._volume.details

    @property
    def proves_password(self) -> bool:
        """True: a digest of the key is in the header."""
        return True

    def change_slots(self, change: SlotChange, cryptography: Cryptography) -> Iterator[Plan]:
        """See :class:`tapfs.driver.KeySlotted`; of a container of version 1."""
        from tapfs.formats.luks.slot_changes import change_slots

        if self._volume.details["version"] != VERSION_1:
            message = "tapfs changes the passwords of LUKS1 only"
            remedy = "cryptsetup luksAddKey and luksRemoveKey do it"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self._file.path, op="amend", remedy=remedy)
        return change_slots(self._file, 0, change, cryptography)

    def unlock(self, password: bytes, cryptography: Cryptography) -> bytearray:
        """The key of the payload; see :func:`tapfs.formats.luks.volume.unlock`."""
        return unlock(self._volume, self._file.read, password, cryptography, self._file.path)


def _volume(file: HostFile) -> Volume:
    head = file.read(0, len(MAGIC) + 2)
    version = int.from_bytes(head[len(MAGIC) :], "big")
    whole = len(head) == len(MAGIC) + 2 and head.startswith(MAGIC)
    if whole and version == VERSION_1:
        return read_version1(file.read, file.path)
    if whole and version != VERSION_2:
        message = f"LUKS version {version} is not known here"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, offset=len(MAGIC), op="open")
    # Without a first header there may be a second one.
    return read_version2(file.read, file.path)


def _payload_bytes(volume: Volume, file: HostFile) -> int:
    """The length of the disk: whole sectors. Raises ImageError(corrupt, unsupported) if the payload is not there."""
    start, size, sector = volume.payload_offset, file.size(), volume.cipher.sector_bytes
    if start == 0:
        message = "is a detached header: its payload lies in another file"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, op="open", remedy="cryptsetup opens it")
    length = size - start if volume.payload_bytes is None else volume.payload_bytes
    if length < 0 or start + length > size:
        message = f"the payload at {start:#x} reaches past the end of the file ({size:#x})"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, op="open")
    return length // sector * sector
