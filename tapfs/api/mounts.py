"""Mounting from Python: `tapfs.mount` and `tapfs.unmount`. As with the command, another process serves the mount."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tapfs.api.command_words import flag, opening_words, option, raise_what_was_met, started
from tapfs.disk.password import require_bytes
from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.engine_names import AUTO
from tapfs.serving.messages import decode


class MountPoint:
    """An image that is mounted. As a context manager it is unmounted at the end of the block."""

    def __init__(self, path: str, *, files: bool) -> None:
        """Not to be called: `tapfs.mount` makes it. `files`: the files inside are shown."""
        self.path = path
        self.files = files

    def __repr__(self) -> str:
        return f"<tapfs.MountPoint {self.path!r} of {'files' if self.files else 'a disk'}>"

    def __fspath__(self) -> str:
        return self.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmount()

    @property
    def disk(self) -> str:
        """The path of the flat disk. Raises ImageError(not_found) for a mount that shows files."""
        if self.files:
            raise ImageError(ErrorKind.NOT_FOUND, "shows files, not the disk", path=self.path, op="name the disk")
        return os.path.join(self.path, "disk")

    def partition(self, number: int) -> str:
        """The path of a partition, whether it is there or not."""
        return os.path.join(os.path.dirname(self.disk), f"part{number}")

    def face(self, format_name: str) -> str:
        """The path of the disk as an image of a format, whether it is there or not."""
        return os.path.join(os.path.dirname(self.disk), f"disk.{format_name}")

    def unmount(self, *, force: bool = False) -> str | None:
        """As `tapfs.unmount`."""
        return unmount(self.path, force=force)


def mount(
    image: str | os.PathLike[str],
    mountpoint: str | os.PathLike[str],
    *,
    writable: bool = False,
    overlay: str | os.PathLike[str] | None = None,
    temporary: bool = False,
    files: bool = False,
    partition: int | None = None,
    sector_size: int | None = None,
    options: Sequence[str] = (),
    faces: Sequence[str] = (),
    engine: str = AUTO,
    verify_reads: bool = False,
    sidecar: str | os.PathLike[str] | None = None,
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
) -> MountPoint:
    """Mount an image on a directory and return when the mount answers.

    The directory shows `disk`, `part1` and so on, and `info.json`; with `files` the files inside instead, those of
    `partition` if the disk has several file systems (0: of the whole disk). `sector_size` is that of the disk which the
    partition table was made on, in bytes, where the table does not say it. `options` are those of ``tapfs mount -o``,
    such as "allow_other" or "uid=1000"; `faces` are formats, as images of which the disk is shown,
    too; `engine` is that of ``tapfs mount --engine``. With `verify_reads` each leaf that is read is compared with the
    `sidecar` (``IMAGE.tapfs-hash``), and what is not as it was hashed is an error for who reads. The other keywords are
    those of `tapfs.open`; a password holds no line feed.

    The mount outlives this program unless `unmount` is called, also at the end of a ``with`` block. It needs pyfuse3
    (``pip install tapfs[fuse]``). Raises ImageError, and ValueError for words that the command does not know.
    """
    if isinstance(options, str) or isinstance(faces, str):
        raise TypeError("options and faces are sequences, not one str")
    require_bytes(password)
    where = os.fsdecode(mountpoint)
    words = ["mount", *flag("--files", files), "--engine", engine]
    words += option("--partition", None if partition is None else str(partition))
    words += option("--sector-size", None if sector_size is None else str(sector_size))
    words += [*flag("--verify-reads", verify_reads)]
    words += option("--sidecar", None if sidecar is None else os.fsdecode(sidecar))
    for each in options:
        words += option("-o", each)
    for each in faces:
        words += option("--as", each)
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
    _run([*words], [os.fsdecode(image), where], password, where)
    return MountPoint(os.path.abspath(where), files=files)


def unmount(mountpoint: str | os.PathLike[str], *, force: bool = False) -> str | None:
    """Flush, unmount, and wait until the image is closed. The result is a remark for the user, if there is one.

    What a killed process left is cleaned up. If the flush fails, or somebody uses the mount, it stays, unless `force`
    is true. Raises ImageError: what the flush met, locked if it is used, not_found if no image is mounted there.
    """
    from tapfs.fuse.unmounting import unmount_image

    return unmount_image(os.fsdecode(mountpoint), force=force)


def _run(words: list[str], names: list[str], password: bytes | None, where: str) -> None:
    """Run the command in a process of its own and raise what it met."""
    with started(words, names, password) as process:
        answer, _ = process.communicate()
    told = decode(answer)
    raise_what_was_met(told)
    if "done" not in told:
        how = "it said why on standard error" if process.returncode >= 0 else f"by signal {-process.returncode}"
        raise ImageError(ErrorKind.IO, f"the mounting process failed: {how}", path=where, op="mount")
