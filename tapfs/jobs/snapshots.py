"""The snapshots inside an image: list, create, apply and delete them, on an image that nobody uses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from tapfs.disk.chain import Layer, OpenOptions, open_layer
from tapfs.driver import SnapshotKeeper, SnapshotLister, SnapshotRecord
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.editing import edit_image


def list_snapshots(path: str, options: OpenOptions) -> Sequence[SnapshotRecord]:
    """The snapshots of an image, in the order that it has them. Its parent is not opened. Raises ImageError."""
    with contextlib.closing(open_layer(path, options)) as layer:
        if not isinstance(layer.driver, SnapshotLister):
            raise _without_snapshots(layer)
        return layer.driver.snapshot_records()


def create_snapshot(path: str, name: str, options: OpenOptions) -> None:
    """Keep the disk as it is now under a name. Raises ImageError."""
    edit_image(path, options, lambda layer: _keeper(layer).create_snapshot(name, int(time.time())), keeps_disk=True)


def apply_snapshot(path: str, name: str, options: OpenOptions) -> None:
    """Make the current disk what the snapshot holds, by its name or id; what it held before is lost."""
    edit_image(path, options, lambda layer: _keeper(layer).apply_snapshot(name))


def delete_snapshot(path: str, name: str, options: OpenOptions) -> None:
    """Forget a snapshot, by its name or id. Raises ImageError."""
    edit_image(path, options, lambda layer: _keeper(layer).delete_snapshot(name), keeps_disk=True)


def _keeper(layer: Layer) -> SnapshotKeeper:
    if not isinstance(layer.driver, SnapshotKeeper):
        raise _without_snapshots(layer)
    return layer.driver


def _without_snapshots(layer: Layer) -> ImageError:
    message = f"{layer.driver.format_name} images keep no snapshots"
    remedy = "keep the disk as it is by an overlay: tapfs create -b FILE NEW"
    return ImageError(ErrorKind.UNSUPPORTED, message, path=layer.path, op="snapshot", remedy=remedy)
