"""The fsspec file system of an image: `fsspec.filesystem("tapfs", image="disk.qcow2")`, read-only.

It has the files of a mount: `disk`, `part1` and so on, `snapshots/NAME`, `info.json`. These are the bytes of disks.
tapfs reads no files of the file systems on them: their own readers take these files.
"""

from __future__ import annotations

import io
import threading
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

from fsspec import AbstractFileSystem  # pyright: ignore[reportMissingTypeStubs]

from tapfs.api import opening
from tapfs.disk.disk_file import DiskFile
from tapfs.disk.json_text import json_text
from tapfs.edit_protocols import SnapshotLister

if TYPE_CHECKING:
    import os

    from tapfs.disk.image import Image

_SNAPSHOTS = "snapshots"


class TapfsFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """What is in one image: its disk, the partitions and the snapshots as files of bytes, read-only."""

    protocol = "tapfs"
    cachable = False

    def __init__(
        self,
        image: str | os.PathLike[str] | Any | None = None,
        *,
        fo: Any = None,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        sector_size: int | None = None,
        **options: Any,
    ) -> None:
        """Open an image as `tapfs.open` does, with its keywords.

        `fo`, `target_protocol` and `target_options` are what fsspec gives for ``tapfs://part1::s3://bucket/disk.qcow2``.
        Raises ImageError.
        """
        super().__init__()  # pyright: ignore[reportUnknownMemberType]  fsspec has no types
        source = fo if image is None else image
        if source is None:
            raise ValueError("the image is missing: fsspec.filesystem('tapfs', image=...)")
        self._source: Any = None
        if target_protocol is not None and isinstance(source, str):
            inner = import_module("fsspec").filesystem(target_protocol, **(target_options or {}))
            source = self._source = inner.open(source, "rb")
        self._lock = threading.Lock()
        self._kept: dict[str, Image] = {}
        try:
            self._image = opening.open(source, **options)
        except BaseException:
            self._close_source()
            raise
        self._image.close_when_dropped()  # fsspec's own functions, which make file systems by themselves, close none
        table = self._image.contents(sector_size=sector_size).table
        parts = {f"part{each.number}": (each.start, each.size) for each in table.partitions if not each.container}
        self._windows = {"disk": (0, self._image.size), **parts}
        driver = self._image.layers[0].driver
        records = driver.snapshot_records() if isinstance(driver, SnapshotLister) else ()
        # A path has no slash in a name, and of snapshots that are called alike the first is meant.
        named = [(each.name or each.id, each.virtual_size) for each in reversed(records)]
        self._snapshots = {name: size for name, size in named if "/" not in name}
        self._info = (json_text(self._image.info) + "\n").encode()

    @property
    def image(self) -> Image:
        """The open image."""
        return self._image

    def close(self) -> None:
        """Close the image, after its files."""
        for each in self._kept.values():
            each.close()
        self._kept.clear()
        self._image.close()
        self._close_source()

    def __del__(self) -> None:
        """Close the file object that the image is read from, too."""
        with suppress(AttributeError):  # it was never open
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:  # noqa: FBT001, FBT002  fsspec's words
        """What is at a path: entries with name, size and type, or without `detail` their names."""
        path = _inner(path)
        entries = self._entries(path)
        return entries if detail else [each["name"] for each in entries]

    def _entries(self, path: str) -> list[dict[str, Any]]:
        snapshots = [_entry(f"{_SNAPSHOTS}/{name}", size) for name, size in self._snapshots.items()]
        if path == _SNAPSHOTS and snapshots:
            return snapshots
        top = [_entry(name, size) for name, (_, size) in self._windows.items()]
        top.append(_entry("info.json", len(self._info)))
        if snapshots:
            top.append({"name": _SNAPSHOTS, "size": 0, "type": "directory"})
        if not path:
            return top
        found = [each for each in (*top, *snapshots) if each["name"] == path]
        if not found:
            raise FileNotFoundError(path)
        return found

    def _open(  # pyright: ignore[reportIncompatibleMethodOverride]  of its words only these are used
        self, path: str, mode: str = "rb", **_: Any
    ) -> io.BufferedIOBase:
        if mode != "rb":
            raise NotImplementedError("what is in an image is only read")
        path = _inner(path)
        if path == "info.json":
            return io.BytesIO(self._info)
        if path in self._windows:
            start, size = self._windows[path]
            return io.BufferedReader(_File(self, self._image, start, size))
        folder, _slash, name = path.partition("/")
        if folder != _SNAPSHOTS or name not in self._snapshots:
            raise FileNotFoundError(path)
        with self._lock:
            disk = self._kept.get(name)
            if disk is None:
                disk = self._kept[name] = self._image.open_snapshot(name)
                disk.close_when_dropped()
        return io.BufferedReader(_File(self, disk, 0, disk.size))


class _File(DiskFile):
    """A file of the file system, which stays open as long as the file is there."""

    def __init__(self, files: TapfsFileSystem, image: Image, start: int, size: int) -> None:
        super().__init__(image, start, size)
        self._files = files


def _inner(path: str) -> str:
    """A path without the protocol and the slashes at its ends."""
    return path.removeprefix("tapfs://").strip("/")


def _entry(name: str, size: int) -> dict[str, Any]:
    return {"name": name, "size": size, "type": "file"}
