"""Locations: tell what the name of an image means, a file or block device of this host, a RAM disk, or an address.

Every command and the Python API ask this module and nothing else. A user writes a file whose name looks like another
kind with a slash: ``./ram:x``, ``./-``, ``./nbd://x``.
"""

from __future__ import annotations

import os

from tapfs.errors import ErrorKind, ImageError
from tapfs.host import ram, standard_input
from tapfs.host.file import LocalFile, look_up
from tapfs.host.gate import ORDINARY, Gate
from tapfs.host.lock import Sharing
from tapfs.host.remote.address import SPELLINGS, Address, scheme_of
from tapfs.host.remote.options import USUAL, RemoteOptions
from tapfs.patterns import pattern
from tapfs.records import dataclass, replace

#: A name with a colon before the first slash, which QEMU takes for an address or for options.
_PROTOCOL = pattern(r"[^/:]+:")

#: The one protocol that means a file.
_FILE_PROTOCOL = "file:"


@dataclass(frozen=True, slots=True)
class Location:
    """What a name means. `name` is how messages say it, `host_path` the file behind it.

    `in_memory`: it is a RAM disk, which is shared by all who may open it. `trusted` is the folder at the start of
    `host_path` that does not come from an image. `known_format` is what a search has found the file to be. `address`:
    it lies elsewhere, and `host_path` is no file. `from_image`: nobody has typed the name, an image has it.
    """

    name: str
    host_path: str
    in_memory: bool = False
    trusted: str = ""
    known_format: str | None = None
    address: Address | None = None
    from_image: bool = False

    @property
    def format_name(self) -> str | None:
        """The format, where the name says it already, or where it is known."""
        return ram.FORMAT if self.in_memory else self.known_format

    def known_as(self, format_name: str) -> Location:
        """The same, once the file was found to be of a format."""
        return replace(self, known_format=format_name)

    def absolute(self) -> Location:
        """The same from any folder."""
        return self if self.in_memory or self.address else _file(os.path.abspath(self.host_path))

    @property
    def resolved(self) -> str:
        """The name from any folder and without symbolic links."""
        return self.name if self.in_memory or self.address else os.path.realpath(self.host_path)

    def identity(self) -> tuple[int, int] | None:
        """Device and inode of what is there now; None if nothing is, or if it cannot be looked at.

        Of an address it is a pair that no file has, and nothing is looked at.
        """
        if self.address is not None:
            return self.address.identity
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
        remote: RemoteOptions = USUAL,
    ) -> LocalFile:
        """Open what is there; `gate` judges it as a parent that an image names, `remote` is for addresses.

        Raises ImageError(not_found, denied, …) as `LocalFile.open_found` and `Gate.look_up_parent` do.
        """
        if self.address is not None:
            if self.from_image:
                (gate or ORDINARY).judge_address(self.address)
            if writable and request_owner is not None:
                # What such a process has under way when it is killed goes on, and its successor cannot wait for it.
                raise ImageError(
                    ErrorKind.UNSUPPORTED,
                    "a disk that outlives its process is not written elsewhere",
                    path=str(self.address),
                    op="open",
                    remedy="write to an overlay on this host",
                )
            from tapfs.host.remote.file import open_remote  # few images lie elsewhere

            return open_remote(self.address, remote, writable=writable)
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
    """What a name that somebody has typed means; nothing is looked at. As for QEMU, "file:" may stand before a path.

    Raises ImageError(invalid_argument) for what is no name, and (unsupported) for unknown addresses, and for standard
    input unless it was made ready (`tapfs.host.standard_input`).
    """
    if name.startswith("/"):  # no other kind of name does
        return _file(name)
    if not name:
        raise ImageError(ErrorKind.INVALID_ARGUMENT, "the name of an image is empty", op="open")
    if name == standard_input.NAME:
        taken = standard_input.taken_path()
        if taken is not None:
            return Location(name, taken)
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "would be standard input or output, and an image is no stream: its bytes are needed in any order",
            path=name,
            op="open",
            remedy="name a file (one of this name is written ./-); 'tapfs convert - FILE' makes one of standard input",
        )
    if name.startswith(_FILE_PROTOCOL):
        return _file(file_name(name.removeprefix(_FILE_PROTOCOL)))
    if ram.is_ram(name):
        path = ram.host_path(name)
        return Location(ram.PREFIX + name[len(ram.PREFIX) :], path, in_memory=True, trusted=os.path.dirname(path))
    if address := Address.parse(name):
        return _elsewhere(address)
    if scheme := scheme_of(name):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"tapfs does not open {scheme}:// addresses",
            path=name,
            op="open",
            remedy=f"it opens {', '.join(SPELLINGS)}; a file of this name is written ./{name}",
        )
    return _file(name)


def locate_parent(child: str, name: str) -> Location:
    """Where the backing file is that the image `child` names. A relative name starts at the child's folder.

    It is the name of a file, which may be that of a RAM disk, or an address. A child that lies elsewhere names no file
    of this host: what it calls an absolute path is one of its own server.
    """
    own = Address.parse(child)
    address = Address.parse(name)
    if address is None and own is not None:
        address = own.joined(name.removeprefix(_FILE_PROTOCOL))
    if address is not None:
        return replace(_elsewhere(address), from_image=True)
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
    if Address.parse(name) is not None:
        return name
    return f"./{name}" if is_protocol(name) else name


def is_protocol(name: str) -> bool:
    """Whether QEMU takes the name of a backing file for an address, or for options: nbd:host, json:{…}."""
    return ":" in name and _PROTOCOL.match(name) is not None and not name.startswith(_FILE_PROTOCOL)


def file_name(path: str) -> str:
    """A file's name so that it means the file: one that would mean something else gets a ./ before it."""
    try:
        location = locate(path)
    except ImageError:
        return f"./{path}"
    return path if location.name == path and not location.in_memory and location.address is None else f"./{path}"


def _elsewhere(address: Address) -> Location:
    return Location(address.text, address.text, address=address)


def _file(path: str) -> Location:
    return Location(path, path, trusted=os.path.dirname(path))
