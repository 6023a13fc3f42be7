"""Amend an image that nobody uses: change in place what was chosen when the image was made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from tapfs.disk.chain import Layer, OpenOptions, open_layer
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image
from tapfs.driver import Amendable, KeySlotted, SlotChange
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind, Range
from tapfs.jobs.editing import edit_image
from tapfs.jobs.zero_data import write_zero_data
from tapfs.plan import Plan
from tapfs.records import replace


def amend_image(path: str, options: Mapping[str, str], opened: OpenOptions, *, password: bytes | None = None) -> None:
    """Have the image `path` be as `options` say; `opened` and `password` say how it is opened.

    The disk reads the same at every moment. A crash leaves the image as it was or as it is wanted, with its zeros
    written as data at worst. Raises ImageError: unsupported for what the format or this image cannot be.
    """
    opened = replace(opened, writable=True)
    with contextlib.closing(open_layer(path, replace(opened, write_base=True))) as layer:
        drops_zeros = _amendable(layer).drops_zeros(options)
    if drops_zeros:
        _write_zeros(path, opened, password)
    edit_image(path, opened, lambda layer: _amendment(layer, options), keeps_disk=True)


def _amendment(layer: Layer, options: Mapping[str, str]) -> Iterator[Plan]:
    return _amendable(layer).amend(options)


def _amendable(layer: Layer) -> Amendable:
    if not isinstance(layer.driver, Amendable):
        name = layer.driver.format_name
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"a {name} image has no options that could be amended",
            path=layer.path,
            op="amend",
            remedy=f"make a new image with other options: tapfs convert -O {name} -o …",
        )
    return layer.driver


def _write_zeros(path: str, opened: OpenOptions, password: bytes | None) -> None:
    """Have the top image say of no granule that it is zeros: over a parent by zeros as data, else by nothing."""
    opened = replace(opened, write_base=True)  # the disk stays the same
    with contextlib.closing(open_image(path, opened, password=password)) as image:
        over_parent = len(image.layers) > 1
        for each in _zeros(image):
            if over_parent:
                write_zero_data(image, each)
            else:
                image.uncover(each.offset, each.length)


def _zeros(image: Image) -> Iterator[Range]:
    """The ranges of which the top image itself says that they are zeros; each map unit is looked at in its turn."""
    driver = image.layers[0].driver
    unit = driver.geometry.map_unit
    for start in range(0, image.size, unit):
        for extent in driver.map(start, min(unit, image.size - start)):
            low, high = max(start, extent.offset), min(start + unit, image.size, extent.offset + extent.length)
            if extent.kind is Kind.ZERO and low < high:
                yield Range(low, high - low)


def change_passwords(path: str, opened: OpenOptions, change: SlotChange) -> None:
    """Give the encrypted image `path` another password, or take one away; the disk and its key stay the same.

    A crash leaves the passwords as they were or as they are wanted; one that is taken away may be gone before the
    image says so. Raises ImageError.
    """
    from tapfs.kernel.cryptography import EngineCryptography  # few images are encrypted

    def plans(layer: Layer) -> Iterator[Plan]:
        if not isinstance(layer.driver, KeySlotted):
            message = f"a {layer.driver.format_name} image has no key slots"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=layer.path, op="amend")
        return layer.driver.change_slots(change, EngineCryptography(layer.path))

    edit_image(path, opened, plans, keeps_disk=True)
