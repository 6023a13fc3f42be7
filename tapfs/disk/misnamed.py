"""A file of a chain whose name promises a format that nothing in the file shows: it was taken for raw.

Such a file may have lost its header, or be a part of a disk of several files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.disk.probe import format_named, own_format_names
from tapfs.driver import Trait, has_trait

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer


def note_of_name(layer: Layer) -> str | None:
    """What to tell of a layer that was taken for raw against its name; None where there is nothing to tell.

    Whoever names the format, the user or the overlay, knows better than the name.
    """
    if not layer.probed or not has_trait(format_named(layer.driver.format_name), Trait.GUESSED):
        return None
    suffix = layer.path.rpartition(".")[2].lower()
    if suffix not in own_format_names() or suffix == layer.driver.format_name:
        return None
    return (
        f"the name ends in .{suffix}, and nothing in the file shows that format: it is taken for raw;"
        " its header may be lost, or it is a part of a disk"
    )
