"""Addresses: tell which names of images are places elsewhere, join them, and compare them with what is allowed.

An address is ``SCHEME://…``, or ``rbd:POOL/IMAGE`` as QEMU writes it. Nothing here opens anything. `urllib` and
`hashlib` are loaded for addresses only, for every command loads this module.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Self

from tapfs.errors import ErrorKind, ImageError
from tapfs.patterns import pattern
from tapfs.records import dataclass

if TYPE_CHECKING:
    from urllib.parse import SplitResult

#: The words of QEMU before the name of a Ceph image.
_RBD = "rbd:"

_SCHEME = pattern(r"([A-Za-z][A-Za-z0-9+.-]*)://")

#: The schemes of obstore's object stores, and of plain web servers.
OBJECT_SCHEMES = frozenset({"http", "https", "s3", "gs", "az"})

#: The schemes of NBD servers; with an s they speak TLS.
NBD_SCHEMES = frozenset({"nbd", "nbds", "nbd+unix", "nbds+unix"})

#: Every way to begin an address, for messages.
SPELLINGS = ("http://", "https://", "s3://", "gs://", "az://", "nbd://", "nbds://", "nbd+unix://", "nbds+unix://", _RBD)


def scheme_of(name: str) -> str | None:
    """The scheme of a name that looks like an address, known or not; None for the name of a file."""
    if name[: len(_RBD)].lower() == _RBD:
        return "rbd"
    if "://" not in name:
        return None
    found = _SCHEME.match(name)
    return None if found is None else found[1].lower()


@dataclass(frozen=True, slots=True)
class Address:
    """A place elsewhere. `text` is the address as it was written, `scheme` how it is reached."""

    text: str
    scheme: str

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The address that a name is; None for a file, and for a scheme that tapfs does not speak."""
        scheme = scheme_of(name)
        known = scheme == "rbd" or scheme in OBJECT_SCHEMES or scheme in NBD_SCHEMES
        return cls(name, scheme) if scheme is not None and known else None

    @classmethod
    def known(cls, name: str) -> Self:
        """The address that a name is, which was told to be one before."""
        found = cls.parse(name)
        if found is None:
            raise AssertionError(f"{name} is no address")
        return found

    @property
    def folder(self) -> str:
        """The address up to the last slash of its path; what follows the path is left out."""
        return self._path_part().rpartition("/")[0] + "/"

    @property
    def parts(self) -> SplitResult:
        """Host, path and so on of any address but one of Ceph. Raises ImageError(invalid_argument)."""
        from urllib.parse import urlsplit

        try:
            parts = urlsplit(self.text)
            _ = parts.port
        except ValueError as error:
            message = f"is no address: {error}"
            remedy = "write SCHEME://HOST:PORT/PATH, a host of IPv6 in brackets; a file of this host as ./NAME"
            raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=str(self), op="open", remedy=remedy) from error
        return parts

    @property
    def identity(self) -> tuple[int, int]:
        """A pair that no file of this host has as device and inode; equal addresses have equal ones."""
        import hashlib

        return -1, int.from_bytes(hashlib.sha256(self._canonical().encode()).digest()[:8], "big")

    def joined(self, name: str) -> Self:
        """The address that a relative file name means beside this one.

        The query of an NBD address says where its server is, so it stays; of others it may be a signature, and goes.
        """
        from urllib.parse import quote

        path = self._path_part()
        head = path[: self._head_length()]
        folder = posixpath.dirname(path[len(head) :])
        way = posixpath.normpath(posixpath.join("/", folder, quote(name)))
        rest = self.text[len(path) :] if self.scheme in NBD_SCHEMES else ""
        return type(self)(head + (way.lstrip("/") if self.scheme == "rbd" else way) + rest, self.scheme)

    def lies_below(self, root: Self) -> bool:
        """Whether this is `root`, or lies below it where that is a folder: a scheme, a host and the start of a path.

        An NBD server is told by more than a path, so such an address lies below itself only.
        """
        if self._canonical() == root._canonical():
            return True
        if self.scheme != root.scheme or self.scheme in NBD_SCHEMES or self.scheme == "rbd":
            return False
        from urllib.parse import unquote

        own, start = self._canonical_path(), root._canonical_path()
        # A server may take an escaped dot or slash for a plain one.
        steps = unquote(own).replace("\\", "/").split("/")
        return own.startswith(start.rstrip("/") + "/") and ".." not in steps and "." not in steps

    def _head_length(self) -> int:
        """The length of scheme and host."""
        if self.scheme == "rbd":
            return len(_RBD)
        start = self.text.index("://") + 3
        ends = [end for end in (self.text.find(sign, start) for sign in "/?#") if end >= 0]
        return min(ends, default=len(self.text))

    def _path_part(self) -> str:
        """The address without its query and fragment."""
        ends = [end for end in (self.text.find(sign) for sign in "?#") if end >= 0]
        return self.text[: min(ends, default=len(self.text))]

    def _canonical_path(self) -> str:
        """Scheme and host in small letters, and the path as it is."""
        path, head = self._path_part(), self._head_length()
        return path[:head].lower() + path[head:]

    def _canonical(self) -> str:
        path = self._path_part()
        return self._canonical_path() + self.text[len(path) :]

    def __str__(self) -> str:
        """The address for people: without a password."""
        if self.scheme == "rbd":
            return self.text
        start, end = self.text.index("://") + 3, self._head_length()
        who, _, host = self.text[start:end].rpartition("@")
        name, _, password = who.partition(":")
        return f"{self.text[:start]}{name}:***@{host}{self.text[end:]}" if password else self.text
