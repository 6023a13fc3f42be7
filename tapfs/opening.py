"""Opening images as the user asked: plainly, under an overlay, or on a file that is open already."""

from __future__ import annotations

from tapfs.chain import Layer, OpenOptions, open_chain, open_parents, password_missing
from tapfs.image import DEFAULT_CACHE_BYTES, Image


def open_image(
    path: str,
    options: OpenOptions,
    *,
    password: bytes | None = None,
    metadata_only: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> Image:
    """Open a chain as an Image. `metadata_only`: an encrypted one needs no password yet.

    With an overlay the Image is writable, and the image at `path` is not touched.
    """
    if options.overlaid:
        from tapfs.overlay import open_overlaid

        layers = open_overlaid(path, options, unlocked=password is not None)
    else:
        layers = open_chain(path, options)
    writable = options.writable or options.overlaid
    image = Image(layers, writable=writable, password=password, cache_bytes=cache_bytes)
    if image.needs_password and not metadata_only:
        image.close()
        raise password_missing(path)
    return image


def open_image_on(layer: Layer, options: OpenOptions, *, password: bytes | None) -> Image:
    """The Image of a top layer that is open already; its parents are opened here."""
    layers = open_parents([layer], options)
    return Image(layers, writable=options.writable, password=password, cache_bytes=DEFAULT_CACHE_BYTES)
