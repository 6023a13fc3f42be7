"""Opening images and looking at them: `tapfs.open`, `tapfs.open_file` and `tapfs.info`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

from tapfs.api.keywords import OpenKeywords
from tapfs.disk.chain import DEFAULT_CACHE_BYTES, OpenOptions
from tapfs.disk.opening import open_image
from tapfs.host.gate import Gate
from tapfs.host.lock import Sharing

if TYPE_CHECKING:
    from tapfs.disk.description import ImageInfo
    from tapfs.disk.disk_file import DiskFile
    from tapfs.disk.image import Image
    from tapfs.disk.package import PackageInfo
    from tapfs.host.file_object import LaterFile, PositionedFile, ReadableFile
    from tapfs.host.remote.options import RemoteOptions


def open(  # noqa: A001 - `tapfs.open` is the name one expects
    path: str | os.PathLike[str] | ReadableFile | PositionedFile | LaterFile,
    *,
    format: str | None = None,  # noqa: A002 - the word of the field
    disk: int | None = None,
    writable: bool = False,
    password: bytes | None = None,
    backing: str | None = None,
    backing_formats: Sequence[str] = (),
    any_parent: bool = False,
    write_base: bool = False,
    snapshot: str | None = None,
    parent_folders: Sequence[str | os.PathLike[str]] = (),
    backing_root: str | None = None,
    gate: Gate | None = None,
    direct: bool = False,
    shared: bool = False,
    metadata_only: bool = False,
    overlay: str | os.PathLike[str] | None = None,
    temporary: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    remote_cache: str | os.PathLike[str] | None = None,
    remote_cache_bytes: int | None = None,
) -> Image:
    """Open an image and its backing chain.

    `path` is a name, or a binary file object with read and seek, or with pread(size, offset) and a size: an open file,
    a member of an archive, what fsspec gives. Such an image is only read, and names no other file unless `backing`,
    `backing_root` or `gate` allow it. What is read of the object is kept in a scratch file. The object stays yours.
    `format` is probed if None; a raw image must be named to be writable. `disk` is the number of the disk in a package
    (.ova, .ovf, .vmx, .vbox, .xva, .box), which one with a single disk need not be told. `password` unlocks
    encrypted images. `backing` replaces the parent that the image names, `backing_formats` say
    what the parents are (nearest first), and `any_parent` takes one that is not the one that the image
    was made over. `write_base` writes an image that overlays lie over, which spoils them.
    An image that names its parent by a UUID and not by a file (VDI) has it searched for in
    its own folder and in `parent_folders`. `snapshot` is the name or id of a disk that the image keeps beside
    its current one. `backing_root` is a directory that parents must lie in,
    with every other file that the image names; `gate` says it in full (`tapfs.Gate`).
    `direct` moves guest data past the host's page cache. `shared` neither refuses other users
    of the files nor is refused. `metadata_only` opens an encrypted image without its password.
    `overlay` is a file that takes all writes, made if it is not there; with `temporary` a file
    without name does, which is gone at the end. Either way the disk is writable, of whatever
    format it is, and the image itself stays as it is. `cache_bytes` bounds the memory for the maps
    of the image and its parents. `remote_cache` is a folder in which what has come of files elsewhere is kept for the
    next time, and `remote_cache_bytes` bounds the local copy of each such file (8 GiB, and at least 64 MiB).
    Raises ImageError.
    """
    options = OpenOptions(
        format=format,
        disk=disk,
        writable=writable,
        backing=backing,
        backing_formats=backing_formats,
        any_parent=any_parent,
        write_base=write_base,
        snapshot=snapshot,
        parent_folders=_names(parent_folders),
        gate=_gate(gate, backing_root),
        direct=direct,
        sharing=Sharing.UNCHECKED if shared else Sharing.EXCLUSIVE,
        overlay=None if overlay is None else os.fsdecode(overlay),
        temporary=temporary,
        cache_bytes=cache_bytes,
        remote=_remote(remote_cache, remote_cache_bytes),
    )
    if isinstance(path, str | os.PathLike):
        return open_image(os.fsdecode(path), options, password=password, metadata_only=metadata_only)
    from tapfs.api.file_objects import open_object

    if gate is None and backing_root is None and backing is None:
        options = replace(options, gate=Gate.nothing())
    return open_object(path, options, password=password, metadata_only=metadata_only)


def _names(folders: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    if isinstance(folders, str):
        raise TypeError("parent_folders is a sequence of names, not one str")
    return tuple(map(os.fsdecode, folders))


def _gate(gate: Gate | None, backing_root: str | None) -> Gate:
    return gate or (Gate() if backing_root is None else Gate.inside(backing_root))


def _remote(folder: str | os.PathLike[str] | None, copy_bytes: int | None) -> RemoteOptions:
    from tapfs.host.remote.options import LEAST_COPY_BYTES, USUAL

    if copy_bytes is not None and copy_bytes < LEAST_COPY_BYTES:
        raise ValueError(f"remote_cache_bytes is at least {LEAST_COPY_BYTES}")
    kept_in = None if folder is None else os.fsdecode(folder)
    return replace(USUAL, kept_in=kept_in, copy_bytes=USUAL.copy_bytes if copy_bytes is None else copy_bytes)


def open_file(
    path: str | os.PathLike[str] | ReadableFile | PositionedFile | LaterFile,
    *,
    partition: int | None = None,
    sector_size: int | None = None,
    **options: Unpack[OpenKeywords],
) -> DiskFile:
    """Open the disk of an image, or one of its partitions, as a binary file object.

    `partition` is the number that `tapfs info` shows. `sector_size` is that of the disk which the partition table was
    made on, in bytes, where the table does not say it. The other keywords are those of `tapfs.open`. Closing the file
    closes the image. Raises ImageError.
    """
    from tapfs.disk.disk_file import file_of

    image = open(path, **options)
    try:
        return file_of(image, partition, owns=True, sector_size=sector_size)
    except BaseException:
        image.abandon()
        raise


def package_info(path: str | os.PathLike[str]) -> PackageInfo | None:
    """What ``tapfs info`` shows of a package (.ova, .ovf, .vmx, .vbox, .xva, .box): its disks, by their numbers.

    None for a file that is no package. Raises ImageError.
    """
    from tapfs.disk.package import describe_package, package_of

    options = OpenOptions()
    with package_of(os.fsdecode(path), options) as opened:
        return None if opened is None else describe_package(opened, options)


def info(path: str | os.PathLike[str], *, sector_size: int | None = None, **options: Unpack[OpenKeywords]) -> ImageInfo:
    """What ``tapfs info`` shows of an image: format, sizes, parents, partitions and file systems.

    `sector_size` is as for `open_file`. The other keywords are those of `tapfs.open`. Of an encrypted image without
    its password all is there but what is on the disk. So it is with a parent that is missing, which the last link of
    `chain` says, and with `gate=Gate.nothing()`, which has no parent looked at. Raises ImageError, also for a parent
    that is refused.
    """
    if options.get("overlay") is not None or options.get("temporary") or options.get("writable"):
        options["metadata_only"] = True
        with open(path, **options) as image:
            return image.description(None if image.needs_password else image.contents(sector_size=sector_size))
    from tapfs.disk.inspection import inspect

    read_only = OpenOptions(
        format=options.get("format"),
        disk=options.get("disk"),
        backing=options.get("backing"),
        backing_formats=options.get("backing_formats", ()),
        any_parent=options.get("any_parent", False),
        snapshot=options.get("snapshot"),
        parent_folders=_names(options.get("parent_folders", ())),
        gate=_gate(options.get("gate"), options.get("backing_root")),
        direct=options.get("direct", False),
        sharing=Sharing.UNCHECKED if options.get("shared") else Sharing.EXCLUSIVE,
        cache_bytes=options.get("cache_bytes", DEFAULT_CACHE_BYTES),
        remote=_remote(options.get("remote_cache"), options.get("remote_cache_bytes")),
    )
    with inspect(os.fsdecode(path), read_only, password=options.get("password")) as found:
        found.raise_refusal()
        return found.infos(sector_size=sector_size)[0]
