"""Give a qcow2 image another parent: its name and its format stand in the head of the first cluster."""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.driver import BackingReference
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.backing import format_word
from tapfs.formats.qcow2.head_change import head_plan
from tapfs.formats.qcow2.header import MAX_NAME_LENGTH, Header
from tapfs.plan import Plan


def rebase_plan(
    header: Header, head: bytes, extensions: Sequence[ext.Extension], backing: BackingReference | None, path: str
) -> Plan:
    """The plan that has the image, whose first cluster is `head`, name another parent, or none.

    Raises ImageError: out_of_bounds for a name that is too long, unsupported for an image that can have no parent.
    """
    name = b"" if backing is None else _name_bytes(backing.name, path)
    if backing is not None and header.has_raw_data_file:
        message = "an image whose data file is a raw disk by itself can have no backing file"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="rebase")
    kept = [each for each in extensions if each.type != ext.BACKING_FORMAT]
    if backing is not None and backing.format is not None:
        kept.insert(0, ext.Extension(ext.BACKING_FORMAT, format_word(backing.format).encode()))
    # The bits of unknown autoclear features are cleared with it, as by every change.
    wanted = header._replace(autoclear=header.kept_autoclear)
    found = head_plan(header, head, extensions, wanted, kept, name)
    if found is None:
        raise _too_long(name, path)
    return found


def _name_bytes(name: str, path: str) -> bytes:
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > MAX_NAME_LENGTH:
        raise _too_long(raw, path)
    if not raw or b"\0" in raw:
        message = "the backing file's name is empty or holds a NUL byte"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="rebase")
    return raw


def _too_long(name: bytes, path: str) -> ImageError:
    message = f"has no room for a backing file's name of {len(name)} bytes"
    return ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="rebase", remedy="give it a shorter name")
