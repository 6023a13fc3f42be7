"""Operations on a disk that `tapfs serve` serves, while clients use it, and the end of its server.

Nothing of a pause outlives the server, so nothing is noted for a successor but what the disk's record shows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tapfs.errors import ErrorKind, ImageError
from tapfs.records import dataclass, replace
from tapfs.serving.disk_operations import DiskInUse, DiskOperations
from tapfs.serving.served_record import ServedRecord, write_record
from tapfs.serving.service import Service

if TYPE_CHECKING:
    import trio

    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog


@dataclass(frozen=True, slots=True)
class OpenedBy:
    """How the user had an image opened: the format that was said, and the key files of encrypted ones."""

    format: str | None = None
    key_files: Sequence[str] = ()


class ServedDisk(DiskInUse, Protocol):
    """The disk of a server."""

    @property
    def clients(self) -> int:
        """How many use it now."""
        ...


class ServedOperations(DiskOperations):
    """The operations on one disk of a server; each is done whole or not at all. All raise ImageError.

    `announce` tells the users of the disk that it has another size. `directory`: where the record is, None if it has
    none.
    """

    def __init__(
        self,
        service: Service,
        disk: ServedDisk,
        record: ServedRecord,
        changing: trio.Lock,
        *,
        directory: Path | None,
        opened: OpenedBy,
        announce: Callable[[], Awaitable[None]],
        plan_log: PlanLog | None = None,
    ) -> None:
        super().__init__(disk, plan_log, changing, mode=record.mode, key_file=opened.key_files)
        self._service = service
        self._users = disk
        self._record = record
        self._directory = directory
        self._opened = opened
        self._announce = announce
        self._temporary = disk.image.temporary
        self._first_path = disk.image.path

    @property
    def clients(self) -> int:
        """How many use the disk now."""
        return self._users.clients

    def status(self) -> dict[str, object]:
        """What is served, and how it stands."""
        return {**super().status(), "clients": self.clients}

    async def stop(self) -> ImageError | None:
        """End the server; what went wrong at its end. The images are closed when this returns."""
        self._service.stop_serving()
        await self._service.ended.wait()
        return self._service.failure

    async def swap(self, file: str, size: int | None, *, keep_names: bool) -> int:
        """The same, for an image that has a name to keep."""
        path = self._disk.image.path
        if self._temporary:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "is written to a temporary overlay, which has no name",
                path=path,
                op="swap",
                remedy="serve it with --overlay FILE",
            )
        if keep_names and self._plan_log is not None:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "has to keep its name for the overlay: that name finds what a killed server has left",
                path=path,
                op="swap",
                remedy="say it without {keep_names}",
            )
        return await super().swap(file, size, keep_names=keep_names)

    async def note_setting(self, **settings: int | None) -> None:
        """Note nothing: a pause ends with the server."""

    async def note_image(self, image: Image) -> None:
        """Have the record show what is served from now on."""
        self._record = replace(self._record, path=image.path, format=image.format_name)
        if self._directory is not None:
            write_record(self._directory, self._record)

    async def note_exchange(self, served: Image, over: Image) -> None:
        """Have the record show the format of the overlay, which gets the name."""
        del served
        await self.note_image(over)

    async def announce_size(self) -> None:
        """Tell the users of the disk what size it has now."""
        await self._announce()

    def told(self, image: Image) -> str | None:
        """The format that was said of the image, if the image still is what was named then."""
        return self._opened.format if image.path == self._first_path else None
