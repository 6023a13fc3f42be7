"""Edit an image that nobody uses: execute the plans of a change to it as a whole, such as a new size or a snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tapfs.disk.chain import Layer, OpenOptions, open_layer
from tapfs.plan import Plan
from tapfs.records import replace


def edit_image(
    path: str, options: OpenOptions, edit: Callable[[Layer], Iterator[Plan]], *, keeps_disk: bool = False
) -> None:
    """Open the image `path` for writing, without its parents, and execute what `edit` plans, one plan after the other.

    `keeps_disk`: the edit changes nothing that is read from the disk, so that overlays over the image do not mind.
    The image is locked meanwhile, and what a crash left to be replayed is replayed first. Each plan is durable before
    the next one is asked for. Whatever ends the edit, the image reads as before it or as wanted
    (`tapfs.edit_protocols`). Raises ImageError.
    """
    options = replace(options, writable=True, write_base=options.write_base or keeps_disk)
    with contextlib.closing(open_layer(path, options)) as layer:
        execute_edit(layer, edit(layer))


def execute_edit(layer: Layer, plans: Iterator[Plan]) -> None:
    """Execute the plans of an edit to an image that is open for writing. Its driver is of no use after that."""
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # what is refused needs no engine

    for plan in plans:
        files = [HostDescriptor(file.descriptor, file.path, writable=file.writable) for file in layer.files]
        execute_on_files(files, plan)
