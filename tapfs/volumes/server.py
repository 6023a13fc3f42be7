"""The process of a storage provider: it listens, and answers each client in a thread."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from tapfs.volumes.varlink import Methods, serve_client

#: Clients at a time; the next one waits.
_CLIENTS = 16
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(listeners: Sequence[socket.socket], methods: Methods, *, path: str | None) -> None:
    """Answer clients until a signal comes. `path`: the socket that is to go away with this process."""
    free = threading.BoundedSemaphore(_CLIENTS)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        with suppress(OSError):
            os.write(writer, b"\0")

    def answer(connection: socket.socket) -> None:
        try:
            serve_client(connection, methods)
        finally:
            free.release()

    before = {number: signal.signal(number, end) for number in _ENDING}
    try:
        with selectors.DefaultSelector() as waiting:
            waiting.register(reader, selectors.EVENT_READ)
            for listener in listeners:
                waiting.register(listener, selectors.EVENT_READ, listener)
            while True:
                for key, _ in waiting.select():
                    if key.data is None:
                        return
                    free.acquire()
                    try:
                        connection, _ = key.data.accept()
                    except OSError:
                        free.release()
                        continue
                    connection.setblocking(True)
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for listener in listeners:
            listener.close()
        os.close(reader)
        os.close(writer)
        if path is not None:
            with suppress(OSError):
                os.unlink(path)
