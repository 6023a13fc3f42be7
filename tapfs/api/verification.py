"""Proofs of disks: `write_sidecar`, `verify` and `damaged_files` of `tapfs`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tapfs.api.jobs import Progress, opened_image
from tapfs.disk.image import Image
from tapfs.extent import Range

if TYPE_CHECKING:
    from tapfs.disk.sidecar import Hashed
    from tapfs.jobs.damaged_files import DamagedPart
    from tapfs.jobs.verify import Verification


def write_sidecar(
    image: str | os.PathLike[str] | Image,
    sidecar: str | os.PathLike[str] | None = None,
    *,
    format: str | None = None,  # noqa: A002 - the word of the field
    password: bytes | None = None,
    leaf_bytes: int = 64 << 10,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Hashed:
    """Hash what a guest reads into a sidecar, the image's name and ".tapfs-hash" unless it is named; see `tapfs hash`.

    `image` is the name of an image (`format` and `password` say how it is opened) or an open Image. The sidecar has its
    name when it is whole and durable. It needs ``pip install tapfs[hash]``. Raises ImageError: exists, unless
    `overwrite`, if there is a sidecar; locked if the image was changed meanwhile.
    """
    from tapfs.jobs.hashing import write_sidecar as write

    with opened_image(image, format, password) as disk:
        path = _sidecar_of(disk, sidecar)
        return write(disk, path, leaf_bytes=leaf_bytes, overwrite=overwrite, progress=progress)


def verify(
    image: str | os.PathLike[str] | Image,
    sidecar: str | os.PathLike[str] | None = None,
    *,
    format: str | None = None,  # noqa: A002 - as above
    password: bytes | None = None,
    root: bytes | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare a disk with its sidecar: `verdict`, and the ranges that are `differing`; see `tapfs verify`.

    `root`: the sidecar must have this one. Raises ImageError(corrupt) for a damaged sidecar, or one of another root.
    """
    from tapfs.disk.sidecar import Sidecar
    from tapfs.jobs.verify import verify as compare_with

    with opened_image(image, format, password) as disk, Sidecar(_sidecar_of(disk, sidecar)) as proof:
        if root is not None:
            proof.require_root(root)
        return compare_with(disk, proof, progress=progress)


def damaged_files(
    image: str | os.PathLike[str] | Image,
    ranges: Iterable[tuple[int, int]],
    *,
    format: str | None = None,  # noqa: A002 - as above
    password: bytes | None = None,
    sector_size: int | None = None,
) -> list[DamagedPart]:
    """The partitions and files that ranges ``(offset, length)`` of a disk belong to; see `tapfs check --files`.

    `sector_size` is as for `open_file`. Raises ImageError where the partition table cannot be read.
    """
    from tapfs.jobs.damaged_files import files_in

    with opened_image(image, format, password) as disk:
        return files_in(disk, [Range(*each) for each in ranges], sector_size=sector_size)


def _sidecar_of(image: Image, named: str | os.PathLike[str] | None) -> str:
    from tapfs.disk.sidecar import usual_name_of

    return usual_name_of(image.layers[0], image.path) if named is None else os.fsdecode(named)
