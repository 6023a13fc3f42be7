"""Listings: the files that a survey looks at under a folder, a prefix of an object store, or a pool of Ceph."""

from __future__ import annotations

import os
import stat
from typing import TypedDict

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.location import locate
from tapfs.host.remote.address import Address
from tapfs.many.image_row import Identity, identity_of

#: The schemes whose folders can be listed, besides rbd.
_STORES = frozenset({"s3", "gs", "az"})


class Entry(TypedDict):
    """A file: its path, and its identity if that can be told without opening it."""

    path: str
    identity: Identity | None


class Listing(TypedDict):
    """What is in a place: files, and folders that are places themselves."""

    files: list[Entry]
    folders: list[str]


def listing_of(path: str, *, named: bool) -> Listing:
    """What is at a path: one file, or the contents of a folder. `named`: a user has named it, so links are followed.

    Below a folder no link to a folder is followed, and a link to a file is that file. What is neither a file nor a
    folder is left out. Raises ImageError.
    """
    location = locate(path)
    if location.address is not None:
        return _elsewhere(location.address)
    if location.in_memory:
        return {"files": [{"path": path, "identity": None}], "folders": []}
    try:
        status = os.stat(location.host_path, follow_symlinks=named)
        if not stat.S_ISDIR(status.st_mode):
            kind = status.st_mode
            found = [{"path": path, "identity": identity_of(status) if stat.S_ISREG(kind) else None}]
            return {"files": found if stat.S_ISREG(kind) or stat.S_ISBLK(kind) else [], "folders": []}  # type: ignore[typeddict-item]
        return _folder(path)
    except OSError as error:
        raise from_os_error(error, path=path, op="list the folder") from error


def _folder(path: str) -> Listing:
    files: list[Entry] = []
    folders: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                status = entry.stat()
            except OSError:  # gone meanwhile, or a link to nothing
                continue
            if stat.S_ISREG(status.st_mode):
                files.append({"path": entry.path, "identity": identity_of(status)})
    files.sort(key=lambda file: file["path"])
    folders.sort()
    return {"files": files, "folders": folders}


def _elsewhere(address: Address) -> Listing:
    if address.scheme in _STORES:
        from tapfs.host.remote.objects import objects_below

        objects = objects_below(address)
        if objects is not None:
            files: list[Entry] = [{"path": each.address, "identity": [each.size, each.identity]} for each in objects]
            return {"files": files, "folders": []}
    elif address.scheme == "rbd":
        from tapfs.host.remote.rbd import images_of_pool, is_pool

        if is_pool(address):
            return {"files": [{"path": each, "identity": None} for each in images_of_pool(address)], "folders": []}
    elif address.text.endswith("/"):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"{address.scheme} addresses have no list of what is below them",
            path=str(address),
            op="list the folder",
            remedy="name the images one by one",
        )
    return {"files": [{"path": address.text, "identity": None}], "folders": []}
