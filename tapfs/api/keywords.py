"""The keywords that say how an image is opened, for every function that opens one."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from tapfs.host.gate import Gate


class OpenKeywords(TypedDict, total=False):
    """The keywords of `tapfs.open`."""

    format: str | None
    disk: int | None
    writable: bool
    password: bytes | None
    backing: str | None
    backing_formats: Sequence[str]
    any_parent: bool
    write_base: bool
    snapshot: str | None
    parent_folders: Sequence[str | os.PathLike[str]]
    backing_root: str | None
    gate: Gate | None
    direct: bool
    shared: bool
    metadata_only: bool
    overlay: str | os.PathLike[str] | None
    temporary: bool
    cache_bytes: int
    remote_cache: str | os.PathLike[str] | None
    remote_cache_bytes: int | None
