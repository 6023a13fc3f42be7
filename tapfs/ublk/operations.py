"""Operations on a block device's disk while it is used, noted in the record of the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from tapfs.host.lock import SHARING_OF_MODE
from tapfs.serving.disk_operations import DiskOperations
from tapfs.serving.threads import in_thread
from tapfs.ublk.record import change_record

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog
    from tapfs.ublk.driver import Driver
    from tapfs.ublk.record import DiskRecord
    from tapfs.ublk.served_disk import ServedDisk


class Operations(DiskOperations):
    """The operations on one device's disk; each is done whole or not at all. All raise ImageError."""

    def __init__(self, disk: ServedDisk, record: DiskRecord, plan_log: PlanLog, driver: Driver) -> None:
        self.changing = trio.Lock()
        super().__init__(
            disk,
            plan_log,
            self.changing,
            mode=record.mode,
            sharing=SHARING_OF_MODE[record.mode],
            key_file=record.key_files,
        )
        self._served = disk
        self._record = record
        self._driver = driver

    def require_no_job(self) -> None:
        """Raise ImageError(locked) while the disk is being committed or mirrored."""
        self._served.require_no_job()

    async def flush(self) -> None:
        """Have all that was answered durable."""
        async with self.alone():
            await in_thread(self._disk.image.flush)

    async def give_up(self) -> None:
        """Have users get the errors that they wait to see mended, and all later ones: the device is to go."""
        self._served.held.give_up()

    async def resize(self, size: int | None, *, force: bool) -> None:
        """The same on kernels that can tell users of another size; on others ImageError(unsupported)."""
        await in_thread(self._driver.require_resizable)
        await super().resize(size, force=force)

    async def swap(self, file: str, size: int | None, *, keep_names: bool) -> int:
        """The same; another size only on kernels that can tell users of it."""
        if size not in (None, self._disk.image.size):
            await in_thread(self._driver.require_resizable)
        return await super().swap(file, size, keep_names=keep_names)

    async def note_setting(self, **settings: int | None) -> None:
        """Note in the record what a successor is to find."""
        if "paused" in settings:
            self._change(paused=settings.pop("paused") == 1)
        if settings:
            self._change(**settings)

    async def note_image(self, image: Image) -> None:
        """Note what is served from now on."""
        self._change(
            path=image.path,
            format=image.format_name,
            backing_formats=tuple(layer.driver.format_name for layer in image.layers[1:]),
            swap="",
        )

    async def note_exchange(self, served: Image, over: Image) -> None:
        """Which file has the name decides which formats hold, so that half of an exchange is nothing."""
        device, inode = over.layers[0].file.identity
        formats = ",".join(layer.driver.format_name for layer in over.layers[1:])
        self._change(
            backing_formats=tuple(layer.driver.format_name for layer in served.layers[1:]),
            swap=f"{device}:{inode} {formats}",
        )

    async def announce_size(self) -> None:
        """Tell the users of the block device what size it has now. Raises ImageError(unsupported) on an old kernel."""
        await in_thread(self._tell_size)

    def told(self, image: Image) -> str | None:
        """The format that was said when the device was attached, if the image still is what was named then."""
        return self._record.format if self._record.path == image.path else None

    def _tell_size(self) -> None:
        self._driver.resize(self._record.number, self._disk.image.size)

    def _change(self, **changes: object) -> None:
        self._record = change_record(self._record.number, **changes)
