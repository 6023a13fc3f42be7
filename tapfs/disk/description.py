"""What `tapfs info` says about an image, as JSON-able data."""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.disk.chain import Layer
from tapfs.driver import Cipher


def describe(layers: Sequence[Layer]) -> dict[str, object]:
    """The description of a chain's top image; sizes in bytes.

    `virtual_size` is the guest's disk, `file_size` the length of the image file and
    `allocated_size` what it takes on the host. `backing` is the parent as the image names it
    and as it was found; `chain` lists every image, the top one first.
    """
    top = layers[0]
    geometry = top.driver.geometry
    backing: dict[str, object] | None = None
    if geometry.backing is not None:
        backing = {
            "name": geometry.backing.name,
            "path": layers[1].path if len(layers) > 1 else None,
            "format": layers[1].driver.format_name if len(layers) > 1 else geometry.backing.format,
        }
    return {
        "path": top.path,
        "format": top.driver.format_name,
        "virtual_size": geometry.virtual_size,
        "file_size": top.file.size(),
        "allocated_size": top.file.allocated_size(),
        "encrypted": geometry.cipher != Cipher.NONE,
        "granule": geometry.granule,
        "backing": backing,
        "details": dict(top.driver.details()),
        "chain": [
            {
                "path": layer.path,
                "format": layer.driver.format_name,
                "virtual_size": layer.driver.geometry.virtual_size,
            }
            for layer in layers
        ],
    }
