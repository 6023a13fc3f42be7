"""The protocols of edits: changes to an image as a whole, such as its size, its parent, its snapshots and its bitmaps.

An edit is a method that returns plans, one at a time. The image is open for writing, by this driver alone, and nothing
is pending in it. What stands after a `yield` may rely on that plan being durable. A plan may be cut off anywhere: the
image then reads as before or as wanted, with leaked space at worst. So a plan says itself what has to be said first,
such as a dirty bit; `Begun.begin` and `end` are not called around it. The driver is opened anew after the last plan.

An edit raises ImageError before its first plan wherever that is possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from tapfs.ciphers import Cryptography
from tapfs.driver_protocols import Driver, Renewing, Snapshotted, WritableDriver
from tapfs.extent import Range
from tapfs.geometry import BackingReference
from tapfs.plan import Plan
from tapfs.records import NamedTuple


@runtime_checkable
class Resizable(WritableDriver, Protocol):
    """A driver whose disk can get another size.

    A disk grows in three steps, of which `tapfs.jobs.resize` does the second: room for it is made, what will be added
    is zeroed by the write path of a driver that was opened with `OpenRequest.grown_size`, and the size is told. So
    stale bytes behind the old end, and those of a longer parent, never show. A driver whose geometry is an identity
    sees to the zeros itself, and is not opened so.
    """

    def make_room(self, size: int) -> Iterator[Plan]:
        """Have tables, and files, for a disk of `size` bytes, which is more than it has. The disk stays as it is.

        Raises ImageError(unsupported, out_of_bounds) for a size that the format or this image cannot have, (no_space)
        and (corrupt).
        """
        ...

    def resize(self, size: int) -> Iterator[Plan]:
        """Have the disk be `size` bytes.

        A larger disk has room already, and what is added to it reads as zeros. What lies behind a smaller size is lost,
        and its space is freed after the size is durable. Raises ImageError as `make_room`, before its first plan.
        """
        ...


@runtime_checkable
class Preallocating(Resizable, Protocol):
    """A driver that gives what was added to its disk places, or space, before anything is written there."""

    @property
    def preallocations(self) -> tuple[str, ...]:
        """The modes that the image can have: "metadata", "falloc", "full"; only "full": zeros are written as data."""
        ...

    def preallocate(self, mode: str, start: int, stop: int) -> Iterator[Plan]:
        """Give ``[start, stop)`` its space: it was just added, reads as zeros, and goes on to read so at every moment.

        "metadata": each cluster has its place; "falloc": the host reserves its space, too; "full": zeros are written.
        Not asked for where only "full" can be. Raises ImageError(no_space, unsupported, corrupt).
        """
        ...


@runtime_checkable
class Rebasable(WritableDriver, Protocol):
    """A driver whose image can name another parent, or none."""

    def rebase(self, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
        """Name `backing` as the parent, of which `parent` is the open driver, if it could be opened; None: no parent.

        Names and identities change, and what the image itself has stays. Where it gets no parent, what showed one reads
        as zeros. Raises ImageError(unsupported, out_of_bounds) for a parent that the image cannot name.
        """
        ...


@runtime_checkable
class Expecting(Rebasable, Protocol):
    """A driver whose image goes on to match its parent while that gets another identity.

    An image that is not only edited may be told so: its driver, with nothing pending and before `begin` or after `end`,
    stays of use after `expect`, and after a `rebase` to the name that the parent has.
    """

    def expect(self, parent: Renewing | None) -> Iterator[Plan]:
        """Have the image match `parent` as it is, and as it will be once its next `begin` is executed.

        None: have the image match its parent whatever identity that gets.
        """
        ...


@runtime_checkable
class Amendable(WritableDriver, Protocol):
    """A driver of whose image some choices of its creation can be changed in place.

    `options` are `-o` pairs, of those that `AmendableFormat.amend_options` names.
    """

    def drops_zeros(self, options: Mapping[str, str]) -> bool:
        """Whether the image must say of no granule that it is zeros before it is amended so.

        Raises ImageError(unsupported) for what the image cannot be.
        """
        ...

    def amend(self, options: Mapping[str, str]) -> Iterator[Plan]:
        """Have the image be as the options say. The disk reads the same.

        Raises ImageError(unsupported, out_of_bounds) for what the image cannot be, (corrupt).
        """
        ...


class SlotChange(NamedTuple):
    """A change of the passwords of an encrypted image, which `password` opens, and goes on opening.

    `adds`: `other` becomes a password, tried in about so many `milliseconds`, in key slot `slot`, None: in a free one.
    Else slot `slot` is emptied, None: all that `other` opens.
    """

    adds: bool
    password: bytes
    other: bytes = b""
    slot: int | None = None
    milliseconds: int = 2000


@runtime_checkable
class KeySlotted(Driver, Protocol):
    """A driver of an encrypted image whose passwords can be changed; the disk and its key stay the same."""

    def change_slots(self, change: SlotChange, cryptography: Cryptography) -> Iterator[Plan]:
        """Give the image another password, or take one away.

        Raises ImageError: denied for a wrong password, unsupported for what the image cannot have.
        """
        ...


class SnapshotRecord(NamedTuple):
    """What an image says of a snapshot: its id, its name, which may be empty, and the size of its disk in bytes.

    It was made at `seconds` since 1970 and `nanoseconds`. `state_bytes` is the length of the saved state of a VM, 0 for
    none, and `clock_nanoseconds` what the clock of the VM said.
    """

    id: str
    name: str
    virtual_size: int
    seconds: int
    nanoseconds: int
    state_bytes: int
    clock_nanoseconds: int


@runtime_checkable
class SnapshotLister(Snapshotted, Protocol):
    """A driver that tells more of the snapshots of its image than their names."""

    def snapshot_records(self) -> Sequence[SnapshotRecord]:
        """The snapshots, in the order that the image has them. Raises ImageError(corrupt, out_of_bounds)."""
        ...


@runtime_checkable
class SnapshotShown(Snapshotted, Protocol):
    """A driver that says which snapshot it shows, whatever the words were that chose it."""

    @property
    def snapshot_id(self) -> str | None:
        """The id of the snapshot; None: the driver shows the current disk."""
        ...


@runtime_checkable
class SnapshotKeeper(Snapshotted, WritableDriver, Protocol):
    """A driver that makes, applies and deletes the snapshots of its image."""

    def create_snapshot(self, name: str, seconds: int) -> Iterator[Plan]:
        """Keep the disk as it is now under `name`; `seconds` since 1970 is when.

        Raises ImageError(exists, unsupported).
        """
        ...

    def apply_snapshot(self, name: str) -> Iterator[Plan]:
        """Make the current disk what the snapshot holds. What it held before is lost. Raises ImageError(not_found)."""
        ...

    def delete_snapshot(self, name: str) -> Iterator[Plan]:
        """Forget a snapshot; what only it refers to is free. Raises ImageError(not_found)."""
        ...


class Bitmap(NamedTuple):
    """A bitmap that an image keeps: which pieces of its disk, `granularity` bytes each, have changed since when.

    `enabled`: it notes what is written from now on. Not `consistent`: the disk has changed without it, so that it says
    nothing.
    """

    name: str
    granularity: int
    enabled: bool
    consistent: bool


@runtime_checkable
class Bitmapped(Driver, Protocol):
    """A driver whose image may keep bitmaps."""

    def bitmaps(self) -> Sequence[Bitmap]:
        """The bitmaps, in the order that the image has them. Raises ImageError(corrupt)."""
        ...

    def bitmap_ranges(self, name: str) -> Iterator[Range]:
        """The ranges of the disk that a bitmap has marked, ascending, merged and inside the disk.

        Raises ImageError(not_found), and (corrupt) for a bitmap that is not consistent.
        """
        ...


@runtime_checkable
class BitmapFollower(Bitmapped, Protocol):
    """A driver that is written to, and whose enabled bitmaps can be asked meanwhile. From any thread."""

    def follows(self, name: str) -> bool:
        """Whether a bitmap notes what is written now."""
        ...

    def followed_ranges(self, name: str, offset: int, length: int) -> Iterator[Range]:
        """What a bitmap that follows marks of a range at this moment: ascending, merged, inside the range."""
        ...


@runtime_checkable
class BitmapKeeper(Bitmapped, WritableDriver, Protocol):
    """A driver that makes, changes and removes the bitmaps of its image."""

    def add_bitmap(
        self, name: str, granularity: int | None, *, enabled: bool, ranges: Sequence[Range] = ()
    ) -> Iterator[Plan]:
        """Keep a new bitmap that marks these ranges, as `store_bitmap` does; None: a usual granularity.

        Raises ImageError(exists, unsupported).
        """
        ...

    def remove_bitmap(self, name: str) -> Iterator[Plan]:
        """Forget a bitmap, which may be inconsistent. Raises ImageError(not_found)."""
        ...

    def enable_bitmap(self, name: str, *, enabled: bool) -> Iterator[Plan]:
        """Have a bitmap note what is written from now on, or not. Raises ImageError(not_found, corrupt)."""
        ...

    def store_bitmap(self, name: str, ranges: Sequence[Range]) -> Iterator[Plan]:
        """Have a bitmap mark these ranges of the disk and no others: to clear it, and to merge others into it.

        The ranges ascend and do not overlap; a piece that is marked in part is marked whole.
        """
        ...
