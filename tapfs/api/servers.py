"""Serving disks by NBD from Python: `tapfs.serve`. As with the command, another process serves."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tapfs.api.command_words import flag, opening_words, option, raise_what_was_met, started
from tapfs.disk.password import require_bytes
from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.messages import decode


class DiskServer:
    """A running NBD server. As a context manager it is closed at the end of the block."""

    def __init__(self, image: str, process: subprocess.Popen[bytes]) -> None:
        """Not to be called: `tapfs.serve` makes it. Raises what the process met before clients could come."""
        self._image = image
        self._process = process
        first = self._line()
        if not first.startswith(b"nbd"):
            with process:
                self._require_done(first)
        #: The address for clients, as an NBD URI.
        self.uri = first.decode(errors="surrogateescape").rstrip("\n")

    def __repr__(self) -> str:
        return f"<tapfs.DiskServer {self.uri!r} of {self._image!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The number of the serving process."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until it has ended by itself, as one with `exit_when_idle` does. Raises ImageError as `close`."""
        if self._process.stdout is None or self._process.stdout.closed:
            return
        last = b""
        with self._process:
            while line := self._line():
                last = line
        self._require_done(last)

    def close(self) -> None:
        """Answer what clients have asked for, flush, close the image and end. Closing twice is allowed.

        Raises the ImageError that the flush met.
        """
        self._process.terminate()
        self.wait()

    def _line(self) -> bytes:
        return b"" if self._process.stdout is None else self._process.stdout.readline()

    def _require_done(self, message: bytes) -> None:
        told = decode(message)
        raise_what_was_met(told)
        if "done" not in told:
            raise ImageError(ErrorKind.IO, "the serving process has failed", path=self._image, op="serve")


def serve(
    image: str | os.PathLike[str],
    *,
    socket: str | os.PathLike[str] | None = None,
    tcp: str | None = None,
    tls_psk: str | os.PathLike[str] | None = None,
    tls_certificates: str | os.PathLike[str] | None = None,
    tls_verify_clients: bool = False,
    name: str | None = None,
    exit_when_idle: bool = False,
    writable: bool = False,
    overlay: str | os.PathLike[str] | None = None,
    temporary: bool = False,
    format: str | None = None,  # noqa: A002 - the word of the field
    disk: int | None = None,
    password: bytes | None = None,
    backing: str | None = None,
    backing_formats: Sequence[str] = (),
    any_parent: bool = False,
    write_base: bool = False,
    snapshot: str | None = None,
    parent_folders: Sequence[str | os.PathLike[str]] = (),
    backing_root: str | None = None,
    direct: bool = False,
    shared: bool = False,
    cache_bytes: int | None = None,
    remote_cache: str | os.PathLike[str] | None = None,
    remote_cache_bytes: int | None = None,
) -> DiskServer:
    """Serve the disk of an image to NBD clients and return when they may come.

    `socket` is the path of a Unix socket, `tcp` a HOST:PORT; without either a socket in the runtime directory is
    taken. `tls_psk`, `tls_certificates`, `tls_verify_clients`, `name` (of the export) and `exit_when_idle` are those
    of ``tapfs serve``. The other keywords are those of `tapfs.open`; a password holds no line feed.

    The server outlives this program unless it is closed. What clients have flushed outlives the server, whatever ends
    it. Raises ImageError, and ValueError for words that the command does not know.
    """
    require_bytes(password)
    words = ["serve", *flag("--exit-when-idle", exit_when_idle), *flag("--tls-verify-clients", tls_verify_clients)]
    words += [*option("--tcp", tcp), *option("--name", name)]
    for word, path in (("--socket", socket), ("--tls-psk", tls_psk), ("--tls-certificates", tls_certificates)):
        words += option(word, None if path is None else os.fsdecode(path))
    words += opening_words(
        writable=writable,
        overlay=overlay,
        temporary=temporary,
        format=format,
        disk=disk,
        backing=backing,
        backing_formats=backing_formats,
        any_parent=any_parent,
        write_base=write_base,
        snapshot=snapshot,
        parent_folders=parent_folders,
        backing_root=backing_root,
        direct=direct,
        shared=shared,
        cache_bytes=cache_bytes,
        remote_cache=remote_cache,
        remote_cache_bytes=remote_cache_bytes,
    )
    where = os.fsdecode(image)
    return DiskServer(where, started(words, [where], password))
