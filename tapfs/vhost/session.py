"""The life of a vhost-user server: front ends, of which one has the disk, and the end by a signal or with the last one.

A front end that goes leaves its guest's requests answered or noted in the in-flight region, so another connection of it
finds nothing lost. The parts that every front end of ours needs are in `tapfs.serving.service`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

import trio

from tapfs.disk.image import Image
from tapfs.disk.plan_log import BEAT_SECONDS
from tapfs.errors import printable
from tapfs.serving.failures import failure_of
from tapfs.serving.listening import remove_socket
from tapfs.serving.log import log
from tapfs.serving.served_control import ServedControl
from tapfs.serving.served_operations import OpenedBy
from tapfs.serving.service import Service
from tapfs.serving.threads import in_thread
from tapfs.vhost.channel import Channel
from tapfs.vhost.conversation import Conversation, RefusedError
from tapfs.vhost.disk import GuestDisk
from tapfs.vhost.messages import MalformedError
from tapfs.vhost.recovery import KeptPlanOf

#: Front ends that are connected at once; the next ones wait in the socket.
_FRONT_ENDS_MAX = 16


class Session:
    """One server from its first to its last front end. Owns the image, the listeners and the socket files."""

    def __init__(
        self,
        image: Image,
        *,
        identifier: bytes,
        listeners: Sequence[socket.socket],
        sockets: Sequence[str] = (),
        exit_when_idle: bool = False,
        kept: KeptPlanOf | None = None,
        opened: OpenedBy,
        wait_on: str = "space",
    ) -> None:
        """`kept` is the plan log that the image was opened with, `wait_on` as for `HeldRequests`."""
        self._wait_on = wait_on
        self._opened = opened
        self._image = image
        self._identifier = identifier
        self._listeners = listeners
        self._sockets = sockets
        self._exit_when_idle = exit_when_idle
        self._kept = kept
        self._service = Service(image.path)
        self._disk: GuestDisk | None = None
        self._ready: Callable[[], None] = lambda: None
        self._room = trio.Semaphore(_FRONT_ENDS_MAX)
        self._conversations: list[Conversation] = []
        #: Who has the disk, and front ends that wait for it.
        self._holder: Conversation | None = None
        self._waiting = trio.lowlevel.ParkingLot()
        #: Whoever changes the disk or its rings, or flushes.
        self._alone = trio.Lock()

    def run(self, ready: Callable[[], None]) -> None:
        """Serve, and call `ready` once front ends may come. Raises the first ImageError, when all is put away."""
        self._ready = ready
        ending = self._service.ending
        if self._kept is not None:
            ending.add("let go of the plan log", self._kept.close)
        ending.add("flush and close the image", self._close_image)
        for path in self._sockets:
            ending.add("remove the socket", partial(remove_socket, path))
        for listener in self._listeners:
            ending.add("close a socket", listener.close)
        self._service.run(self)

    # What the service asks for

    def prepare(self) -> None:
        """Start the threads."""
        disk = GuestDisk(self._image, self._identifier, self._wait_on)
        self._service.ending.add("end the native threads", disk.stop)
        disk.start()
        self._disk = disk

    async def serve(self) -> None:
        """Let front ends in until the end."""
        disk = self._guest_disk
        if disk.image.writable:
            self._service.flush_periodically(lambda: disk.image, alone=self._alone)
        self._service.start(self._watch_problems, "watch the rings")
        if self._kept is not None:
            self._service.start(partial(self._beat, self._kept), "say that the server lives")
        ServedControl(self._service, "vhost-user").add(
            disk,
            self._alone,
            name=os.fsdecode(self._identifier),
            addresses=self._sockets,
            opened=self._opened,
            announce=self._tell_of_size,
            plan_log=None if self._kept is None else self._kept.log,
        )
        async with trio.open_nursery() as nursery:
            for listener in self._listeners:
                nursery.start_soon(self._accept, trio.socket.from_stdlib_socket(listener.dup()), nursery)
            self._ready()

    async def end(self) -> None:
        """End for a signal."""
        self._service.stop_serving()

    # The tasks

    @property
    def _guest_disk(self) -> GuestDisk:
        if self._disk is None:
            raise AssertionError("the disk is used before `prepare`")
        return self._disk

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        with listener:
            while True:
                await self._room.acquire()
                await trio.lowlevel.wait_readable(listener)
                try:
                    connection, _ = await listener.accept()
                except OSError as error:  # no descriptor, no memory, or a front end that has gone already
                    self._room.release()
                    log.error("no connection: %s", failure_of(error, op="accept", path=self._service.path))
                    continue
                nursery.start_soon(self._look_after, connection)

    async def _look_after(self, connection: trio.socket.SocketType) -> None:
        """A front end from its first to its last message."""
        with connection:
            await self._converse(connection)
        self._room.release()
        if self._exit_when_idle and not self._conversations:
            log.info("the front end has gone")
            self._service.stop_serving()

    async def _have_disk(self, conversation: Conversation) -> None:
        """Wait until a front end has the disk."""
        while self._holder is not conversation:
            holder = self._holder
            if holder is not None:
                async with self._alone:
                    if self._holder is holder and holder.is_moving_away:
                        await in_thread(holder.hand_over)
                        self._holder = None
                        log.info("the guest has moved to another machine")
            if self._holder is None:
                conversation.take_disk()
                self._holder = conversation
            elif self._holder is holder:
                await self._waiting.park()

    async def _converse(self, connection: trio.socket.SocketType) -> None:
        """Do what a front end says until it goes. No fault of it is one of the server."""
        conversation = Conversation(self._guest_disk)
        self._conversations.append(conversation)
        channel = Channel(connection)
        try:
            while (received := await channel.receive()) is not None:
                header, payload, descriptors = received
                if conversation.needs_disk(header.kind) and not conversation.handed_over:
                    await self._have_disk(conversation)
                obey = partial(conversation.answer, header.kind, payload, descriptors, need_reply=header.need_reply)
                async with self._alone:
                    message, attached = await in_thread(obey)
                self._waiting.unpark_all()
                try:
                    await channel.send(message, attached)
                finally:
                    for descriptor in attached:
                        os.close(descriptor)
        except (MalformedError, RefusedError) as error:
            log.warning("the connection to a front end ends: %s", printable(str(error)))
        except OSError as error:
            log.info("the connection to a front end is broken: %s", error.strerror)
        except Exception as error:  # noqa: BLE001  the next one is served
            log.error("a front end could not be served: %s", failure_of(error, op="serve", path=self._service.path))
        finally:
            with trio.CancelScope(shield=True):
                async with self._alone:
                    await in_thread(conversation.close)
                    self._conversations.remove(conversation)
                    if self._holder is conversation:
                        self._holder = None
            self._waiting.unpark_all()

    async def _tell_of_size(self) -> None:
        """Have the guest hear, if there is one, that its disk has another size."""
        for conversation in self._conversations:
            conversation.tell_of_change()
        await trio.lowlevel.checkpoint()

    def _close_image(self) -> None:
        (self._image if self._disk is None else self._disk.image).close()

    async def _beat(self, kept: KeptPlanOf) -> None:
        while True:
            kept.beat()
            await trio.sleep(BEAT_SECONDS)

    async def _watch_problems(self) -> None:
        """Say in the log how a guest has broken the protocol."""
        descriptor = self._guest_disk.problem_descriptor
        while True:
            await trio.lowlevel.wait_readable(descriptor)
            os.eventfd_read(descriptor)
            for index, problem in self._guest_disk.problems():
                log.warning("ring %d takes no more requests until it is set up anew: the guest %s", index, problem)
