"""The bundle of a Parallels disk: `DiskDescriptor.xml` says which of the files beside it lies over which.

A file of a bundle does not name its parent itself (docs/specs/parallels.md, "Bundles").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tapfs.driver import BackingReference, HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.xml_tree import Element, parsed

DESCRIPTOR_NAME = "DiskDescriptor.xml"
BUNDLE_FILE_SUFFIX = ".hds"
_ROOT = "Parallels_disk_image"

SECTOR = 512
_MAX_BYTES = 16 << 20
_NONE = "{00000000-0000-0000-0000-000000000000}"
#: The state that a machine writes to, where the descriptor names no other.
_TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
#: The kinds of files, with the format of each.
_FORMATS = {"compressed": "parallels", "plain": "raw"}


class BundleFile(NamedTuple):
    """One file of the disk, which holds what was written in one state of it: `format` is tapfs's name."""

    state: str
    name: str
    format: str

    @property
    def reference(self) -> BackingReference:
        """The file as a parent: beside the descriptor, else where that says, which may be a path of another machine."""
        beside = _last_part(self.name)
        return BackingReference(beside, self.format, others=() if beside == self.name else (self.name,))


class Bundle(NamedTuple):
    """The disk of `size` bytes: its files by their states, and of each state the one that it was made from."""

    size: int
    files: Mapping[str, BundleFile]
    parents: Mapping[str, str]
    top: str

    @property
    def newest(self) -> BundleFile:
        """The file that a machine writes to."""
        return self.files[self.top]

    def below(self, path: str) -> BackingReference | None:
        """The parent of the file at `path`, None for the first one.

        Raises ImageError(corrupt) for a file that is not listed: nobody can say what lies below it.
        """
        own = next((each for each in self.files.values() if _last_part(each.name) == _last_part(path)), None)
        if own is None:
            message = f"is none of the files that {DESCRIPTOR_NAME} beside it lists, so what lies below it is unknown"
            remedy = "open it in a folder of its own if it has no parent"
            raise ImageError(ErrorKind.CORRUPT, message, path=path, op="open", remedy=remedy)
        state = self.parents.get(own.state, _NONE)
        if state == _NONE:
            return None
        if state not in self.files:
            message = f"{DESCRIPTOR_NAME} beside it lists no file of the state {state}, which lies below it"
            raise ImageError(ErrorKind.CORRUPT, message, path=path, op="open")
        return self.files[state].reference


def read_bundle(file: HostFile) -> Bundle:
    """The bundle that the descriptor `file` describes.

    Raises ImageError: corrupt; unsupported where the disk is encrypted or in several parts.
    """

    def corrupt(message: str) -> ImageError:
        return ImageError(ErrorKind.CORRUPT, message, path=file.path, op="open")

    def unsupported(message: str) -> ImageError:
        return ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, op="open", remedy="prl_disk_tool reads it")

    if file.size() > _MAX_BYTES:
        raise corrupt(f"is a descriptor of {file.size()} bytes")
    root = parsed(file.read(0, _MAX_BYTES), corrupt)
    if root.name != _ROOT:
        raise corrupt("is no descriptor of a Parallels disk")
    if _text(root, "Disk_Parameters", "Encryption", "Engine") not in {"", _NONE}:
        raise unsupported("the disk is encrypted by Parallels, which tapfs does not read")
    storages = list(root.all("StorageData", "Storage"))
    if len(storages) != 1:
        raise unsupported(f"the disk is in {len(storages)} parts, which tapfs does not join")
    size = _text(root, "Disk_Parameters", "Disk_size")
    if not size.isdecimal() or len(size) > 16:
        raise corrupt(f"has a disk of {size or 'no'} sectors")
    files = {each.state: each for each in map(_file, storages[0].all("Image"))}
    if len(files) != sum(1 for _ in storages[0].all("Image")):
        raise corrupt("lists a state of the disk twice")
    for each in files.values():
        if not each.name or not each.format:
            raise corrupt(f"has no file, or one of an unknown type, for the state {each.state}")
    parents = {_text(shot, "GUID"): _text(shot, "ParentGUID") for shot in root.all("Snapshots", "Shot")}
    named = _text(root, "Snapshots", "TopGUID")
    leaves = files.keys() - set(parents.values())
    top = next((state for state in (named, _TOP, *(leaves if len(leaves) == 1 else ())) if state in files), None)
    if top is None:
        raise corrupt(f"does not say which of its {len(files)} files is the newest")
    return Bundle(int(size) * SECTOR, files, parents, top)


def _file(image: Element) -> BundleFile:
    return BundleFile(_text(image, "GUID"), _text(image, "File"), _FORMATS.get(_text(image, "Type").lower(), ""))


def _text(element: Element, *path: str) -> str:
    found = element.first(*path)
    return "" if found is None else found.text


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]
