"""Locations: tell what the name of an image means, a file or block device of this host, or a RAM disk.

Every command and the Python API ask this module and nothing else. Names of other kinds, such as nbd://host, will be
told apart here, too. A user writes a file whose name looks like another kind with a slash: ``./ram:x``, ``./-``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from tapfs.errors import ErrorKind, ImageError
from tapfs.host import ram
from tapfs.host.file import LocalFile, look_up
from tapfs.host.gate import Gate
from tapfs.host.lock import Sharing

#: "nbd://host": an address, and not a file.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

#: A name with a colon before the first slash, which QEMU takes for an address or for options.
_PROTOCOL = re.compile(r"[^/:]+:")

#: The one protocol that means a file.
_FILE_PROTOCOL = "file:"

#: The name that many programs take for standard input and output.
_STREAM = "-"


@dataclass(frozen=True, slots=True)
class Location:
    """What a name means. `name` is how messages say it, `host_path` the file behind it.

    `in_memory`: it is a RAM disk, which is shared by all who may open it. `trusted` is the folder at the start of
    `host_path` that does not come from an image. `known_format` is what a search has found the file to be.
    """

    name: str
    host_path: str
    in_memory: bool = False
    trusted: str = ""
    known_format: str | None = None

    @property
    def format_name(self) -> str | None:
        """The format, where the name says it already, or where it is known."""
        return ram.FORMAT if self.in_memory else self.known_format

    def known_as(self, format_name: str) -> Location:
        """The same, once the file was found to be of a format."""
        return replace(self, known_format=format_name)

    def absolute(self) -> Location:
        """The same from any folder."""
        return self if self.in_memory else _file(os.path.abspath(self.host_path))

    def identity(self) -> tuple[int, int] | None:
        """Device and inode of what is there now; None if nothing is, or if it cannot be looked at."""
        try:
            status = os.stat(self.host_path, follow_symlinks=not self.in_memory)
        except (OSError, ValueError):
            return None
        return status.st_dev, status.st_ino

    def open(
        self,
        *,
        writable: bool = False,
        sharing: Sharing = Sharing.EXCLUSIVE,
        direct: bool = False,
        request_owner: int | None = None,
        gate: Gate | None = None,
    ) -> LocalFile:
        """Open what is there; `gate` judges it as a parent that an image names.

        Raises ImageError(not_found, denied, …) as `LocalFile.open_found` and `Gate.look_up_parent` do.
        """
        if gate is not None and not (self.in_memory and gate.roots is None):
            found = gate.look_up_parent(self.host_path, trusted=self.trusted)
        else:
            found = ram.look_up(self.name) if self.in_memory else look_up(self.host_path)
        try:
            if self.in_memory:
                ram.judge(os.fstat(found), self.name)
            return LocalFile.open_found(
                found,
                self.name,
                writable=writable,
                sharing=Sharing.UNCHECKED if self.in_memory else sharing,
                direct=direct,
                request_owner=request_owner,
            )
        finally:
            os.close(found)


def locate(name: str) -> Location:
    """What a name that somebody has typed means; nothing is looked at.

    Raises ImageError(invalid_argument) for what is no name, and (unsupported) for streams and addresses.
    """
    if not name:
        raise ImageError(ErrorKind.INVALID_ARGUMENT, "the name of an image is empty", op="open")
    if name == _STREAM:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "would be standard input or output, and an image is no stream: its bytes are needed in any order",
            path=name,
            op="open",
            remedy="name a file; one of this name is written ./-",
        )
    if ram.is_ram(name):
        path = ram.host_path(name)
        return Location(ram.PREFIX + name[len(ram.PREFIX) :], path, in_memory=True, trusted=os.path.dirname(path))
    if address := _ADDRESS.match(name):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"tapfs does not open {address[1]}:// addresses",
            path=name,
            op="open",
            remedy=f"name a file, a block device or ram:NAME; a file of this name is written ./{name}",
        )
    return _file(name)


def locate_parent(child: str, name: str) -> Location:
    """Where the backing file is that the image `child` names. A relative name starts at the child's folder.

    It is always the name of a file, which may be that of a RAM disk.
    """
    folder = os.path.dirname(child)
    path = file_name(os.path.join(folder, name.removeprefix(_FILE_PROTOCOL)))
    in_memory = ram.name_of(path)
    return Location(path if in_memory is None else in_memory, path, in_memory is not None, trusted=folder)


def stored_parent(name: str) -> str:
    """How an image names the backing file that a user calls `name`, so that tapfs and QEMU find the same file."""
    if not name:
        raise ImageError(ErrorKind.INVALID_ARGUMENT, "the name of the backing file is empty", op="create")
    if ram.is_ram(name):
        return ram.host_path(name)
    return f"./{name}" if is_protocol(name) else name


def is_protocol(name: str) -> bool:
    """Whether QEMU takes the name of a backing file for an address, or for options: nbd:host, json:{…}."""
    return _PROTOCOL.match(name) is not None and not name.startswith(_FILE_PROTOCOL)


def file_name(path: str) -> str:
    """A file's name so that it means the file: one that would mean something else gets a ./ before it."""
    try:
        return path if not locate(path).in_memory else f"./{path}"
    except ImageError:
        return f"./{path}"


def _file(path: str) -> Location:
    return Location(path, path, trusted=os.path.dirname(path))
