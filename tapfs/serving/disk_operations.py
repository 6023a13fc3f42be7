"""Operations on a disk while somebody uses it: pause, resume, snapshot, resize, limit. For every front end.

A change that is to outlive this process is noted by the front end before it takes effect here. So after a crash at any
moment the next process serves the disk either as it was or as it was to be.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from tapfs.disk.leaf import exchange, overlay_for_name
from tapfs.disk.live import (
    Overlaid,
    image_over,
    let_others_in,
    let_others_read,
    overlay_on,
    refuse_others,
    require_room_in_chain,
    resized,
)
from tapfs.disk.password import given_password
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.lock import Sharing
from tapfs.host.sandbox import confinement
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog
    from tapfs.kernel.metrics import Metrics
    from tapfs.serving.held_requests import HeldRequests


class RateLimit(NamedTuple):
    """Per second; 0: none."""

    bytes: int = 0
    requests: int = 0


class DiskInUse(Protocol):
    """The disk of a front end: an image, and what serves it. Methods block; one at a time."""

    paused: bool
    limit: RateLimit

    @property
    def image(self) -> Image:
        """What is served."""
        ...

    @property
    def held(self) -> HeldRequests:
        """The requests that wait for space."""
        ...

    @property
    def connected(self) -> bool:
        """Whether somebody can use it."""
        ...

    def pause(self) -> None:
        """Begin no more requests and wait until none is in flight."""
        ...

    def resume(self) -> None:
        """Take requests again."""
        ...

    def replace(self, image: Image) -> Image:
        """Serve another image from now on; only while it is paused. The old one, which is the caller's now."""
        ...

    def set_limit(self, limit: RateLimit) -> None:
        """Limit the rate from now on."""
        ...

    def statistics(self) -> dict[str, int]:
        """The counters since the process began."""
        ...

    def metrics(self) -> Metrics:
        """What was asked for since the process began, by kind, and how long it took."""
        ...


class DiskOperations:
    """The operations on one disk; each is done whole or not at all. All raise ImageError.

    A front end says in a subclass how what is to last is noted, and how its users are told of another size. `changing`
    keeps operations apart. `mode`: "r", "w" or "w!". `sharing`: who is let in beside us. `key_file` has the password of
    an encrypted image. `plan_log`: None where nobody outlives this process who was told that a write is done.
    """

    def __init__(
        self,
        disk: DiskInUse,
        plan_log: PlanLog | None,
        changing: trio.Lock,
        *,
        mode: str,
        key_file: str | Sequence[str] | None,
        sharing: Sharing = Sharing.EXCLUSIVE,
    ) -> None:
        self._disk = disk
        self._plan_log = plan_log
        self._changing = changing
        self._mode = mode
        self._sharing = sharing
        self._key_file = key_file
        #: Whether the disk is paused only for as long as somebody holds it.
        self.held_at_rest = False

    # What a front end brings

    async def note_setting(self, **settings: int | None) -> None:
        """Note for a successor: `paused`, `limit_bytes`, `limit_requests` (None: not any more)."""
        raise NotImplementedError

    async def note_image(self, image: Image) -> None:
        """Note what is served from now on."""
        raise NotImplementedError

    async def note_exchange(self, served: Image, over: Image) -> None:
        """Note that the image `over` the one that is `served` is about to get its name, and the formats of each."""
        raise NotImplementedError

    async def announce_size(self) -> None:
        """Tell the users of the disk what size it has now."""
        raise NotImplementedError

    def told(self, image: Image) -> str | None:
        """The format that the front end's user said of the image, if the image still is what that named."""
        raise NotImplementedError

    def require_no_job(self) -> None:
        """Raise ImageError(locked) while the disk is being copied."""

    def require_taken_over(self) -> None:
        """Raise ImageError(locked) while somebody else may still have the disk."""

    def look_again(self) -> None:
        """Have what the disk is to do next be looked at: it may be possible by now."""

    # The operations

    def status(self) -> dict[str, object]:
        """What is served, and how it stands."""
        image = self._disk.image
        return {
            "pid": os.getpid(),
            "sandbox": confinement.description(),
            "connected": self._disk.connected,
            "paused": self._disk.paused,
            "waiting": None if self._disk.held.reason is None else str(self._disk.held.reason),
            "mode": self._mode,
            "path": image.path,
            "format": image.format_name,
            "size": image.size,
            "parents": list(image.parents),
            "limit_bytes": self._disk.limit.bytes,
            "limit_requests": self._disk.limit.requests,
        }

    def statistics(self) -> dict[str, object]:
        """The rings' counters and the engine's since this process began (a swap begins the engine's anew)."""
        return {**self._disk.image.statistics()._asdict(), **self._disk.statistics()}

    def metrics(self) -> dict[str, object]:
        """What was asked for, by kind of request, with histograms of the latencies."""
        from tapfs.kernel.metrics import as_data

        return as_data(self._disk.metrics())

    async def pause(self) -> None:
        """Take no more requests, and have the image durable and at rest. It lasts until `resume`, whatever crashes."""
        async with self.alone():
            if self._disk.paused:
                if self.held_at_rest:  # it lasts now
                    await self.note_setting(paused=1)
                    self.held_at_rest = False
                return
            async with self.at_rest():
                await in_thread(self._disk.image.flush)
                await self.note_setting(paused=1)
                self._disk.paused = True
            log.info("paused")

    async def resume(self) -> None:
        """Take requests again, and try again what waits for space."""
        # Without waiting for another operation, which may wait for these very requests.
        self._disk.held.retry()
        async with self.alone():
            if not self._disk.paused:
                return
            await self.note_setting(paused=None)
            self._disk.paused = self.held_at_rest = False
            self._disk.resume()
            self.look_again()
            log.info("resumed")

    async def limit(self, *, limit_bytes: int | None, limit_requests: int | None) -> None:
        """Limit the rate per second; None leaves a limit as it is, 0 ends it."""
        async with self.alone():
            old = self._disk.limit
            new = RateLimit(
                old.bytes if limit_bytes is None else limit_bytes,
                old.requests if limit_requests is None else limit_requests,
            )
            await self.note_setting(limit_bytes=new.bytes, limit_requests=new.requests)
            self._disk.set_limit(new)

    async def swap(self, file: str, size: int | None, *, keep_names: bool) -> int:
        """A live snapshot: from now on an overlay takes the writes, and what was served stays as it is.

        What was served has the name `file` afterwards, and the overlay the name that the disk has had, by which the
        toolstack opens it again (`tapfs.disk.leaf`). With `keep_names` the overlay is `file` instead; it is made unless
        it is there, empty, with the served image as its parent. `size`: bytes of a new overlay; None: as the disk has.
        When this returns the old image is durable and may be copied away. Returns how many images the chain has now.
        """
        async with self.alone():
            self.require_no_job()
            image = self._disk.image
            if not image.writable:
                raise ImageError(ErrorKind.READ_ONLY, "was attached read-only", path=image.path, op="swap")
            if not os.path.isabs(file):
                raise ImageError(ErrorKind.INVALID_FORMAT, "is no absolute path", path=file, op="swap")
            require_room_in_chain(image)
            try:
                await self.refuse_others()
                return await self._swapped(image, file, size, keep_names=keep_names)
            finally:
                self.let_others_in()

    async def _swapped(self, image: Image, file: str, size: int | None, *, keep_names: bool) -> int:
        # What takes long comes before the guest has to wait.
        await in_thread(image.flush)
        if keep_names:
            overlaid = await in_thread(partial(overlay_on, image, file, size))
        else:
            overlaid = await in_thread(partial(overlay_for_name, image, file, size, told=self.told(image)))
        try:
            settle = self.note_image if keep_names else partial(self._exchange, overlaid)
            await self._put_on_top(overlaid, settle, exchanged=not keep_names)
        finally:
            overlaid.layer.close()
        now = self._disk.image
        if now.size != image.size:
            await self.announce_size()
        log.info("swapped: %s now lies over %s", now.path, now.layers[1].path)
        return len(now.layers)

    async def resize(self, size: int | None, *, force: bool) -> None:
        """Give a raw image or RAM disk `size` bytes, or (None) see what length it has now; the guest is told.

        Fewer than before only with `force`. The new length is durable.
        """
        async with self.alone():
            self.require_no_job()
            before = self._disk.image.size
            async with self.at_rest():
                await in_thread(self._disk.image.flush)
                image = await in_thread(partial(resized, self._disk.image, size, force=force))
                self._disk.replace(image).abandon()
            if image.size != before:
                log.info("resized from %d to %d bytes", before, image.size)
            await self.announce_size()

    async def scrub(self, offset: int) -> Mapping[str, object]:
        """Read a part of the disk from `offset` on and compare it with the image's sidecar; see `scrub_step`.

        Others may use the disk meanwhile; no other operation begins.
        """
        from tapfs.serving.scrubbing import scrub_step  # few disks are scrubbed

        async with self.alone():
            return await in_thread(partial(scrub_step, self._disk.image, offset, None))

    async def _put_on_top(
        self, overlaid: Overlaid, settle: Callable[[Image], Awaitable[None]], *, exchanged: bool
    ) -> None:
        """Serve the overlay, once `settle` has it found by a successor; else it goes, and the disk is as it was.

        Where its names were to be `exchanged`, `settle` has either done that or failed. Otherwise a successor may have
        been told of the overlay as soon as `settle` has begun: then the overlay, empty as it is, must not go any more.
        """
        needed = False
        try:
            async with self.at_rest():
                image = await in_thread(partial(self._opened_over, overlaid, exchanged=exchanged))
                try:
                    needed = not exchanged
                    await settle(image)
                    needed = True
                except BaseException:
                    image.abandon()
                    raise
                self._disk.replace(image).abandon()
                let_others_read(image)
        except BaseException:
            if not needed:
                overlaid.discard()
            raise

    async def _exchange(self, overlaid: Overlaid, image: Image) -> None:
        """Exchange the names. Which file has the name decides which formats hold, so that half of it is nothing."""
        served = self._disk.image
        await self.note_exchange(served, image)
        await in_thread(partial(exchange, served, overlaid))

    def _opened_over(self, overlaid: Overlaid, *, exchanged: bool) -> Image:
        self._disk.image.end_writing()  # it is a parent from now on
        password = given_password(self._key_file)
        return image_over(overlaid, self._disk.image, password=password, plan_log=self._plan_log, exchanged=exchanged)

    async def refuse_others(self) -> None:
        """Let nobody else write the disk until `let_others_in`. Raises ImageError(locked) if another does.

        What others write is not among our marks, and goes into the old image where its name passes to another.
        """
        await in_thread(partial(refuse_others, self._disk.image))

    def let_others_in(self) -> None:
        """Share the disk with others as before."""
        if not self._disk.image.closed:
            let_others_in(self._disk.image, self._sharing)

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """One operation at a time, and never half of one: a process that is to end waits for it."""
        async with self._changing:
            with trio.CancelScope(shield=True):
                yield

    @asynccontextmanager
    async def at_rest(self) -> AsyncGenerator[None]:
        """The rings without anything in flight; afterwards the disk resumes, unless an operator has paused it.

        Raises the ImageError that requests wait for: they stay in flight until that is mended.
        """
        if (reason := self._disk.held.reason) is not None:
            raise ImageError(
                reason.kind,
                f"the guest waits: {reason}",
                path=self._disk.image.path,
                op="change",
                remedy="mend that, then say tapfs resume",
            )
        if not self._disk.paused:
            await in_thread(self._disk.pause)
        try:
            yield
        finally:
            if not self._disk.paused:
                self._disk.resume()
