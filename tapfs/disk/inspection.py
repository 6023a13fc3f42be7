"""Inspect an image whose parents may be missing, refused or not trusted. The image's own facts are told in any case."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from tapfs.disk.chain import OpenOptions, open_layer
from tapfs.disk.description import ImageInfo, describe
from tapfs.disk.image import Image
from tapfs.disk.misnamed import note_of_name
from tapfs.disk.password import require_bytes
from tapfs.disk.unopened_parent import ParentState, UnopenedParent, open_what_is_there


class Inspection:
    """An image and as many of its parents as could be opened. Close it, or use it in a `with`.

    `unopened` is the parent at which the chain ends early, None if the chain is whole. Of a chain that is not whole
    `image` gives the map and what the layers say of themselves. The bytes of the disk are not known then and must not
    be read from it.
    """

    def __init__(self, image: Image, unopened: UnopenedParent | None) -> None:
        self.image = image
        self.unopened = unopened

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.image.close()

    def infos(self, *, sector_size: int | None = None) -> list[ImageInfo]:
        """What `info` says of each open image, the top one first; of that one also what is on a disk that is whole.

        `sector_size` is that of the disk's partition table (`Image.contents`).
        """
        image = self.image
        described = [describe(image.layers[depth:], self.unopened) for depth in range(len(image.layers))]
        if self.unopened is None and not image.needs_password:
            contents = image.contents(sector_size=sector_size)
            note = note_of_name(image.layers[0])
            if note is not None:
                contents.table.note(note)
            described[0] = image.description(contents)
        return described

    def raise_refusal(self) -> None:
        """Raise the ImageError of a parent that was refused; one that is missing is none."""
        if self.unopened is not None and self.unopened.error is not None and self.unopened.state is ParentState.REFUSED:
            raise self.unopened.error


def inspect(path: str, options: OpenOptions, *, password: bytes | None = None) -> Inspection:
    """Open an image, read-only, and its parents as far as that is possible.

    With `Gate.nothing()` no parent is looked at. An encrypted image needs no password, but without it nothing is told
    of what is on the disk. Raises ImageError if the image itself cannot be opened.
    """
    require_bytes(password)
    layers = [open_layer(path, options)]
    try:
        unopened = open_what_is_there(layers, options)
        return Inspection(Image(layers, writable=False, password=password, cache_bytes=options.cache_bytes), unopened)
    except BaseException:
        for each in layers:
            each.close()
        raise
