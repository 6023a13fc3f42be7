"""The options of `tapfs amend` for qcow2: what can be changed in an image that is there, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2.header import COMPRESSION_DEFLATE, LAZY_REFCOUNTS, REFCOUNT_ORDER_2, Header
from tapfs.formats.qcow2.option_values import COMPAT, COMPRESSION, REFCOUNT_ORDER, SWITCH
from tapfs.formats.qcow2.signature import VERSIONS

OP = "amend"
_Value = TypeVar("_Value")

AMEND_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "compat": "1.1: version 3; 0.10: version 2, for readers of before 2012, if nothing needs version 3",
        "lazy_refcounts": "on or off: whether a writer may leave reference counts for a repair after a crash",
        "compression_type": "zlib or zstd, as long as nothing in the image is compressed",
        "refcount_bits": "bits of a reference count, a power of two from 1 to 64: all counts are written anew",
        "data_file": "the name of the data file, which has to be renamed afterwards",
        "encrypt.state": "active: --new-key-file becomes a password; inactive: --old-key-file is none any more",
        "encrypt.keyslot": "the key slot that is filled or emptied, 0 to 7",
        "encrypt.iter-time": "milliseconds that a new password takes to be tried (default 2000)",
        "data_file_raw": "off: the data file need not read as the disk any more",
    }
)

_CONVERT = "make a new image: tapfs convert -O qcow2 -o {}=…"
_FIXED = {
    "cluster_size": _CONVERT.format("cluster_size"),
    "extended_l2": _CONVERT.format("extended_l2"),
    "preallocation": _CONVERT.format("preallocation"),
    "backing_file": "say tapfs rebase -u -b FILE, which changes the name alone",
    "backing_fmt": "say tapfs rebase -u -b FILE -F FORMAT, which changes the names alone",
}


class Wanted(NamedTuple):
    """What an image is to be. `data_file` None: the name stays."""

    version: int
    lazy_refcounts: bool
    compression: int
    data_file: str | None
    raw: bool
    refcount_order: int


def parse_wanted(options: Mapping[str, str], header: Header, path: str) -> Wanted:
    """What the options make of an image with this header. Raises ImageError(unsupported) for what cannot be."""
    for key in options:
        if key in _FIXED:
            raise refused(f"{key} of an image that is there cannot be changed", path, _FIXED[key])
        if key.startswith("encrypt."):
            raise refused(f"{key}: passwords change by themselves, without other options", path)
        if key not in AMEND_OPTIONS:
            raise refused(f"unknown option {key!r} for qcow2", path, f"the options are {', '.join(AMEND_OPTIONS)}")
    version = _choice(options, "compat", COMPAT, header.version, path)
    is_old = version == VERSIONS[0]  # it has neither lazy refcounts nor a compression type: nobody has to say so
    lazy = not is_old and header.compatible & LAZY_REFCOUNTS != 0
    compression = COMPRESSION_DEFLATE if is_old else header.compression_type
    wanted = Wanted(
        version,
        _choice(options, "lazy_refcounts", SWITCH, lazy, path),
        _choice(options, "compression_type", COMPRESSION, compression, path),
        options.get("data_file"),
        _choice(options, "data_file_raw", SWITCH, header.has_raw_data_file, path),
        _choice(options, "refcount_bits", REFCOUNT_ORDER, header.refcount_order, path),
    )
    if is_old and wanted.refcount_order != REFCOUNT_ORDER_2 and "refcount_bits" in options:
        raise refused("refcount_bits other than 16 need compat=1.1", path)
    if is_old and (wanted.lazy_refcounts or wanted.compression != COMPRESSION_DEFLATE):
        raise refused("lazy_refcounts=on and compression_type=zstd need compat=1.1", path)
    _require_data_file(wanted, header, path)
    return wanted


def _require_data_file(wanted: Wanted, header: Header, path: str) -> None:
    if wanted.data_file is not None and not header.has_data_file:
        raise refused("data_file: the image has none, and its data cannot leave it", path, _CONVERT.format("data_file"))
    if wanted.data_file is not None and (not wanted.data_file or "\0" in wanted.data_file):
        raise refused("data_file: is no name of a file", path)
    if wanted.raw and not header.has_raw_data_file:
        message = "data_file_raw=on: what the data file holds outside the disk's clusters is not known to be zeros"
        raise refused(message, path, _CONVERT.format("data_file_raw"))


def _choice(options: Mapping[str, str], name: str, values: Mapping[str, _Value], now: _Value, path: str) -> _Value:
    text = options.get(name)
    if text is None:
        return now
    if text not in values:
        raise refused(f"{name}={text}: must be one of {', '.join(values)}", path)
    return values[text]


def refused(message: str, path: str, remedy: str | None = None) -> ImageError:
    """The error of an amendment that the image cannot have."""
    return ImageError(ErrorKind.UNSUPPORTED, message, path=path, op=OP, remedy=remedy)
