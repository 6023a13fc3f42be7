"""Operations on a guest's disk while the guest uses it, as xenstore and other domains concern them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.lock import SHARING_OF_MODE
from tapfs.serving.disk_operations import DiskOperations
from tapfs.xen.disk.disk_image import specification_of, swap_note
from tapfs.xen.host import find_host
from tapfs.xen.xenstore.client import connect

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog
    from tapfs.xen.disk.backend import Backend
    from tapfs.xen.disk.settings import DiskSettings

#: Seconds that the guest waits for a xenstored that went while a swap was being noted, and between two looks.
_UNSURE_SECONDS = 5.0
_UNSURE_PAUSE = 0.1


class Operations(DiskOperations):
    """The operations on one backend's disk; each is done whole or not at all. All raise ImageError."""

    def __init__(self, backend: Backend, settings: DiskSettings, plan_log: PlanLog) -> None:
        super().__init__(
            backend.disk,
            plan_log,
            backend.changing,
            mode=settings.mode,
            sharing=SHARING_OF_MODE[settings.mode],
            key_file=settings.key_files,
        )
        self._backend = backend
        self._served = backend.disk
        self._settings = settings

    def look_again(self) -> None:
        """Have what the disk is to do next be looked at: it may be possible by now."""
        self._backend.look_again()

    def require_no_job(self) -> None:
        """Raise ImageError(locked) while the disk is being committed or mirrored."""
        self._served.require_no_job()

    def require_taken_over(self) -> None:
        """Raise ImageError(locked) while another domain of the same virtual machine may still have the disk."""
        if self._backend.is_to_take_over:
            raise ImageError(
                ErrorKind.LOCKED,
                "awaits its guest, and is opened anew when that connects",
                path=self._disk.image.path,
                op="change the disk",
                remedy="wait until the guest runs",
            )

    def told(self, image: Image) -> str | None:
        """The format that the toolstack says of the image, if the image still is what it named."""
        specification = self._settings.specification
        return specification.format if specification.path == image.path else None

    async def announce_size(self) -> None:
        """Tell the guest what size its disk has now."""
        await self._backend.announce_size()

    async def note_setting(self, **settings: int | None) -> None:
        """Note in xenstore what a successor is to find."""
        await self.note({f"tapfs/{name.replace('_', '-')}": value for name, value in settings.items()})

    async def note_exchange(self, served: Image, over: Image) -> None:
        """Which file has the name decides which formats hold, so that half of an exchange is nothing."""
        formats = specification_of(served)[1]
        await self.note({"tapfs/backing-formats": formats, "tapfs/swap": swap_note(over)})

    async def note_image(self, image: Image) -> None:
        """Note what is served from now on. If xenstored goes before it has answered, see what it holds afterwards.

        To serve one image while another is noted would leave the plan of the one to a successor that serves the other.
        """
        specification, formats = specification_of(image)
        reachable = self._backend.reachable
        try:
            await self.note({"tapfs/spec": specification, "tapfs/backing-formats": formats})
        except ImageError as error:
            if not reachable or error.kind is not ErrorKind.IO or not await self._is_noted(specification):
                raise

    async def _is_noted(self, specification: str) -> bool:
        with trio.move_on_after(_UNSURE_SECONDS):
            while True:
                try:
                    # The backend's own connection may come back only when this operation is over.
                    async with connect(find_host()) as store:
                        return await store.read(f"{self._backend.device.backend}/tapfs/spec") == specification
                except ImageError:
                    await trio.sleep(_UNSURE_PAUSE)
        return False

    async def note(self, values: dict[str, str | int | None]) -> None:
        """Write keys of the device into xenstore (None: remove). Raises ImageError: not_found if it is gone, io."""
        if not await self._backend.change(values):
            raise ImageError(ErrorKind.NOT_FOUND, "the device is gone", path=self._backend.device.backend, op="change")
