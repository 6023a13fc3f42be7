"""An image behind the vhost-user back end of this process, and front ends before it."""

from __future__ import annotations

import socket
import struct
import threading
from types import TracebackType
from typing import Self

from tapfs.disk.image import Image
from tapfs.vhost.conversation import Conversation, RefusedError
from tapfs.vhost.disk import GuestDisk
from tapfs.vhost.messages import HEADER, MalformedError, read_header
from tests.vhost_front_end import FrontEnd


class Served:
    """The disk of a guest. At the end of the block it, its front ends and the image are closed."""

    def __init__(self, image: Image, identifier: bytes = b"serial", wait_on: str = "nothing") -> None:
        self.image = image
        self.disk = GuestDisk(image, identifier, wait_on)
        self.ended: list[str] = []
        self._front_ends: list[FrontEnd] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self.disk.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for front_end in self._front_ends:
            front_end.close()
        self.wait_until_gone()
        self.disk.stop()
        self.image.close()

    def wait_until_gone(self) -> None:
        """Return when no front end is connected any more."""
        for thread in self._threads:
            thread.join()

    def connect(self, memory: int | None = None, memory_bytes: int = 8 << 20) -> FrontEnd:
        """A front end; those before it are gone."""
        ours, theirs = socket.socketpair()
        front_end = FrontEnd(ours, memory_bytes, memory)
        self._front_ends.append(front_end)
        thread = threading.Thread(target=self._converse, args=(theirs,))
        thread.start()
        self._threads.append(thread)
        return front_end

    def _converse(self, connection: socket.socket) -> None:
        """The loop of `tapfs.vhost.session` without trio."""
        conversation = Conversation(self.disk)
        conversation.take_disk()
        try:
            with connection:
                while True:
                    data, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 16)
                    if not data:
                        break
                    header = read_header(data)
                    payload = connection.recv(header.length, socket.MSG_WAITALL) if header.length else b""
                    message, attached = conversation.answer(
                        header.kind, payload, list(descriptors), need_reply=header.need_reply
                    )
                    if message:
                        socket.send_fds(connection, [message], attached)
        except (MalformedError, RefusedError, struct.error) as error:
            self.ended.append(str(error))
        except OSError:
            pass
        finally:
            conversation.close()
