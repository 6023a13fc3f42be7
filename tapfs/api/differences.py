"""Differences between disks: `diff`, `write_diff` and `apply` of `import tapfs`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO, Literal

from tapfs.api.jobs import Progress, opened_image
from tapfs.disk.image import Image
from tapfs.errors import from_os_error

if TYPE_CHECKING:
    from tapfs.jobs.apply import ApplyReport
    from tapfs.jobs.diff import ChangedExtent, DiffReport

_Disk = str | os.PathLike[str] | Image


def diff(
    old: _Disk,
    new: _Disk,
    *,
    old_format: str | None = None,
    new_format: str | None = None,
    password: bytes | None = None,
    progress: Progress | None = None,
) -> Iterator[ChangedExtent]:
    """The ranges in which the disk `new` differs from `old`, ascending, in units of 4096 bytes.

    Each is the name of an image or an open Image; `password` is for both. The old disk has zeros behind its end. What
    both take from the same place is not read. Raises ImageError when either cannot be read.
    """
    from tapfs.jobs.diff import changed_extents

    with opened_image(old, old_format, password) as a, opened_image(new, new_format, password) as b:
        yield from changed_extents(a, b, progress)


def write_diff(
    old: _Disk,
    new: _Disk,
    output: str | os.PathLike[str] | BinaryIO,
    *,
    old_format: str | None = None,
    new_format: str | None = None,
    password: bytes | None = None,
    proof: Literal["none", "sample", "all"] = "sample",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DiffReport:
    """Write the stream that makes `new` of `old` (docs/diff-stream.md).

    `output` is the name of a file, which appears when it is complete and durable, or a binary file, which is written
    from front to back and not flushed. `proof` says how much of what both disks have the stream has digests of.
    Raises ImageError: exists if there is such a file, unless `overwrite`.
    """
    from tapfs.jobs.diff import write_diff as write
    from tapfs.jobs.diff import write_diff_file
    from tapfs.jobs.differences import Proof

    kind = Proof(proof)
    with opened_image(old, old_format, password) as a, opened_image(new, new_format, password) as b:
        if isinstance(output, str | os.PathLike):
            name = os.fsdecode(output)
            return write_diff_file(a, b, name, proof=kind, overwrite=overwrite, progress=progress)
        return write(a, b, output, proof=kind, progress=progress)


def apply(
    base: _Disk,
    stream: str | os.PathLike[str] | BinaryIO,
    target: str | os.PathLike[str] | None = None,
    *,
    target_format: str | None = None,
    format: str | None = None,  # noqa: A002 - the word of the field
    password: bytes | None = None,
    overlay: bool = False,
    options: Mapping[str, str] | None = None,
    dry_run: bool = False,
    resume: bool = False,
    write_base: bool = False,
    progress: Progress | None = None,
) -> ApplyReport:
    """Apply a stream of `write_diff` to the disk `base`, which must be the old one of it.

    The result is the new image `target`, of the format and `options` that are given, or an `overlay` over the base. It
    appears under its name when it is complete and durable. Without a target `base` itself changes. Then `stream` must
    be a file that can be read twice, and after a crash the same call goes on; `resume` as on the command line, and
    `write_base` changes it even if overlays lie over it. A
    `dry_run` only proves that the stream is whole and fits the base. Raises ImageError: corrupt for a damaged stream,
    invalid_argument for another base.
    """
    from tapfs.jobs.apply import apply_in_place, apply_to_new, verify_base

    in_place = target is None and not dry_run
    with ExitStack() as stack:
        file = stack.enter_context(_stream(os.fsdecode(stream))) if isinstance(stream, str | os.PathLike) else stream
        path = file.name if isinstance(getattr(file, "name", None), str) else None
        disk = stack.enter_context(opened_image(base, format, password, writable=in_place, write_base=write_base))
        if dry_run:
            return verify_base(disk, file, path=path, resume=resume, progress=progress)
        if target is None:
            return apply_in_place(disk, lambda: _from_start(file), path=path, resume=resume, progress=progress)
        return apply_to_new(
            disk,
            file,
            os.fsdecode(target),
            target_format=target_format or disk.format_name,
            overlay=overlay,
            options=options,
            path=path,
            progress=progress,
        )


def _stream(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise from_os_error(error, path=path, op="open the difference") from error


def _from_start(stream: BinaryIO) -> BinaryIO:
    stream.seek(0)
    return stream
