"""The images that a commit works on: an overlay and what lies above its base, and the base, open for writing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from tapfs.disk.chain import Layer, OpenOptions, open_layers
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.location import locate, locate_parent
from tapfs.records import NamedTuple, replace


class CommitLayers(NamedTuple):
    """The overlay and the images between it and the base, top first; and the base with its parents."""

    above: list[Layer]
    below: list[Layer]

    @property
    def child(self) -> Layer:
        """The image whose parent the base is."""
        return self.above[-1]

    def close(self) -> None:
        """Close all files."""
        for layer in (*self.above, *self.below):
            layer.close()


def open_for_commit(
    path: str, options: OpenOptions, base: str | None, *, empties: bool, links: bool = False
) -> CommitLayers:
    """Open the overlay `path` and its chain with the base writable: `base`, or else the overlay's own parent.

    With `empties` the overlay is writable, too. So is the child of the base where that names the base by an identity,
    which may change when the base is written, and with `links` in any case. Raises ImageError: unsupported (no parent),
    invalid_argument (the base is not in the chain), read_only.
    """
    with contextlib.ExitStack() as stack:
        looked = open_layers(path, replace(options, writable=False))
        for layer in looked:
            stack.callback(layer.close)
        depth = depth_in_chain(looked, base, op="commit")
        reference = looked[depth - 1].driver.geometry.backing
        named_by_identity = reference is not None and reference.identity is not None
    writable = {depth}
    if named_by_identity or links:
        writable.add(depth - 1)
    if empties:
        writable.add(0)
    layers = open_layers(path, replace(options, writable=0 in writable, writable_parents=frozenset(writable)))
    opened = CommitLayers(layers[:depth], layers[depth:])
    # The chain may have changed between the two looks.
    if depth_in_chain(layers, base, op="commit") != depth:
        opened.close()
        raise ImageError(ErrorKind.LOCKED, "has another chain than a moment ago", path=path, op="commit")
    return opened


def depth_in_chain(layers: Sequence[Layer], base: str | None, *, op: str) -> int:
    """Where in the chain `base` is, None: the parent.

    A relative name starts at the current folder, or else at that of the overlay.
    """
    path = layers[0].path
    if len(layers) == 1:
        raise ImageError(ErrorKind.UNSUPPORTED, "has no backing file", path=path, op=op)
    if base is None:
        return 1
    for location in (locate(base), locate_parent(path, base)):
        identity = location.identity()
        for depth, layer in enumerate(layers[1:], start=1):
            if identity == layer.file.identity:
                return depth
    raise ImageError(
        ErrorKind.INVALID_ARGUMENT,
        f"{base} is not in its backing chain: {', '.join(layer.path for layer in layers[1:])}",
        path=path,
        op=op,
    )
