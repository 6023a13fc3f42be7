"""The engines of a mount: native threads beside pyfuse3, or pyfuse3 alone, answer the kernel.

`auto` takes the best engine that works. That is the kernel itself (passthrough) for a read-only disk that is a file
byte for byte, and native threads for every other disk. pyfuse3 is taken where native threads cannot be started. An
image that cannot be served, or a directory that cannot be mounted on, is the same error with every engine, so pyfuse3
is not tried then. An engine that is asked for by name and does not work is an error. A writable disk is passed
through only when the user asks for it, because the kernel may then write past the end of the disk and lengthen the
image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress

from tapfs.disk.image import Image
from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.engine_names import AUTO, NATIVE, PASSTHROUGH, PYFUSE3
from tapfs.fuse.handover import Handover, ShownFiles
from tapfs.fuse.init_request import PlainConnection
from tapfs.fuse.native import NativeEngine, native_threads
from tapfs.fuse.operations import ImageOperations
from tapfs.fuse.outside import Outside
from tapfs.fuse.settings import MountSettings
from tapfs.fuse.tree import Tree
from tapfs.fuse.verified_reads import VerifiedReads
from tapfs.host.fuse_binding import pyfuse3
from tapfs.host.fuse_connection import further_connections, kind_of_failure
from tapfs.records import dataclass
from tapfs.serving.log import log


@dataclass(frozen=True, slots=True)
class Attachment:
    """A mounted file system that waits to be served by `pyfuse3.main`; before that, neither is there."""

    native: NativeEngine | None = None
    operations: ImageOperations | None = None
    plain: PlainConnection | None = None

    @property
    def name(self) -> str:
        """The engine that serves the disk; known once the mount has answered."""
        if self.native is None:
            return PYFUSE3
        return PASSTHROUGH if self.native.passthrough else NATIVE

    def handover(self, tree: Tree, seed: bytes, files: ShownFiles | None) -> Handover | None:
        """What a server that follows this one needs, once the mount has answered; None: the kernel would not let it."""
        native, plain, operations = self.native, self.plain, self.operations
        served = native or plain
        init = None if served is None else served.init_request()
        if init is None or operations is None:
            return None
        backing = dict[int, int]() if native is None else native.backing()
        return Handover(native is not None, init, backing, tree.partitions, operations.modified_ns, seed, files)

    @property
    def connections(self) -> Sequence[int]:
        """The descriptors of the connection, which are those of who serves."""
        if self.native is not None:
            return self.native.connections
        return () if self.plain is None else (self.plain.connection,)

    def require(self, choice: str, mountpoint: str) -> None:
        """Raise ImageError(unsupported) if passthrough was asked for and the kernel has refused it."""
        if choice == PASSTHROUGH and self.name != PASSTHROUGH:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "the kernel cannot serve this disk by itself",
                path=mountpoint,
                op="mount",
                remedy="it takes root, Linux 6.9 and a regular file that is the disk and nothing else: a raw image,"
                " or a flat VMDK of one extent",
            )


def attach(
    image: Image,
    tree: Tree,
    mountpoint: str,
    *,
    choice: str,
    outside: Outside,
    modified_ns: int,
    settings: MountSettings,
    verified: VerifiedReads | None = None,
) -> Attachment:
    """Mount and make the pyfuse3 session; `verified` reads go through pyfuse3 alone.

    Raises ImageError; nothing is mounted then.
    """
    # An image that cannot be served is refused here: no engine serves it any better.
    _ = image.engine_disk
    if choice != PYFUSE3 and verified is None:
        connection = outside.connect()
        try:
            return _attach_native(
                image,
                tree,
                mountpoint,
                connection,
                choice=choice,
                outside=outside,
                modified_ns=modified_ns,
                settings=settings,
            )
        except ImageError as error:
            if choice != AUTO:
                raise
            log.warning("%s: served by pyfuse3 alone: %s", mountpoint, error)
    connection = outside.connect()
    with _unmounted_on_failure(outside):
        return _plain(
            image, tree, mountpoint, connection, None, modified_ns=modified_ns, settings=settings, verified=verified
        )


def _attach_native(
    image: Image,
    tree: Tree,
    mountpoint: str,
    connection: int,
    *,
    choice: str,
    outside: Outside,
    modified_ns: int,
    settings: MountSettings,
) -> Attachment:
    """Native threads on a mounted connection. Raises ImageError; nothing is mounted then."""
    with _unmounted_on_failure(outside):
        passthrough = choice == PASSTHROUGH or (choice == AUTO and not image.writable)
        connections = [connection, *further_connections(connection, native_threads() - 1)]
        native = NativeEngine(image, tree, connections, passthrough=passthrough)
        return _started(native, image, tree, mountpoint, modified_ns=modified_ns, settings=settings)


def take_over(
    image: Image,
    tree: Tree,
    mountpoint: str,
    connections: Sequence[int],
    handover: Handover,
    *,
    settings: MountSettings,
    verified: VerifiedReads | None = None,
) -> Attachment:
    """Go on with a mount whose server was killed, as that has served it. Raises ImageError; it stays mounted then.

    The connections are taken over, and closed on an error.
    """
    modified_ns = handover.modified_ns
    if not handover.native:
        (connection,) = connections
        init = handover.init
        return _plain(
            image, tree, mountpoint, connection, init, modified_ns=modified_ns, settings=settings, verified=verified
        )
    passthrough = bool(handover.backing)
    native = NativeEngine(image, tree, connections, passthrough=passthrough, handover=handover)
    return _started(native, image, tree, mountpoint, modified_ns=modified_ns, settings=settings)


def _plain(
    image: Image,
    tree: Tree,
    mountpoint: str,
    connection: int,
    init: bytes | None,
    *,
    modified_ns: int,
    settings: MountSettings,
    verified: VerifiedReads | None,
) -> Attachment:
    """Pyfuse3 alone on a mounted connection; `init` is what another server was sent that it follows."""
    plain = PlainConnection(connection, mountpoint, init)
    operations = ImageOperations(
        image, tree, modified_ns=modified_ns, on_init=plain.accepted, settings=settings, verified=verified
    )
    try:
        _start_session(operations, plain.session_path(), mountpoint)
    except BaseException:
        plain.close()
        raise
    return Attachment(None, operations, plain)


def _started(
    native: NativeEngine, image: Image, tree: Tree, mountpoint: str, *, modified_ns: int, settings: MountSettings
) -> Attachment:
    try:
        native.start()
        operations = ImageOperations(
            image, tree, modified_ns=modified_ns, last_write_ns=native.last_write_ns, settings=settings
        )
        _start_session(operations, native.session_path(), mountpoint)
    except BaseException:
        native.stop()
        raise
    return Attachment(native, operations)


@contextmanager
def _unmounted_on_failure(outside: Outside) -> Generator[None]:
    """Unmount what `connect` has mounted if it cannot be served."""
    try:
        yield
    except BaseException:
        with suppress(ImageError):
            outside.unmount(lazy=True)
        raise


def _start_session(operations: ImageOperations, where: str, mountpoint: str) -> None:
    """Have pyfuse3 serve the descriptor that the path `where` names."""
    with _captured_stderr() as said:
        try:
            pyfuse3.init(operations, where, set())
        except RuntimeError as error:
            raise ImageError(
                kind_of_failure(said()), f"cannot mount: {said() or error}", path=mountpoint, op="mount"
            ) from error


@contextmanager
def _captured_stderr() -> Generator[Callable[[], str]]:
    """Catch what libfuse and fusermount3 write to stderr; the result gives it as one line."""
    # In memory: a folder for temporary files may be missing.
    with os.fdopen(os.memfd_create("stderr"), "r+b") as caught:

        def said() -> str:
            caught.seek(0)
            lines = caught.read().decode(errors="backslashreplace").split("\n")
            return "; ".join(line.strip() for line in lines if line.strip())

        saved = os.dup(2)
        try:
            os.dup2(caught.fileno(), 2)
            try:
                yield said
            finally:
                os.dup2(saved, 2)
        finally:
            os.close(saved)
