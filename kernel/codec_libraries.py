"""The shared libraries of codecs that the engine is not linked with, and the remedy where one is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tapfs.driver import Codec
from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel._engine import lib
from tapfs.records import NamedTuple


class _Library(NamedTuple):
    """The names of a library: as the system has it, as the module of a package of Python has it, and for people."""

    names: tuple[str, ...]
    module: str | None
    remedy: str


#: Few images are packed by these.
CODECS_OF_LIBRARIES: dict[Codec, _Library] = {
    Codec.BZIP2: _Library(("libbz2.so.1.0", "libbz2.so.1"), None, "install libbz2 (on Debian the package libbz2-1.0)"),
    Codec.LZMA: _Library(("liblzma.so.5",), None, "install liblzma (on Debian the package liblzma5)"),
    Codec.LZFSE: _Library(
        ("liblzfse.so.1", "liblzfse.so"), "liblzfse", "pip install 'tapfs[dmg]', which brings pyliblzfse"
    ),
}


def load_codec(codec: Codec, path: str | None) -> None:
    """Have the engine open the library of a codec for the image `path`. Raises ImageError(unsupported) without one."""
    library = CODECS_OF_LIBRARIES[codec]
    for name in _candidates(library):
        if lib.tapfs_codec_library(codec, os.fsencode(name)) == 0:
            return
    raise ImageError(
        ErrorKind.UNSUPPORTED,
        f"is packed with {codec.name.lower()}, and the library for that is not installed",
        path=path,
        op="unpack",
        remedy=library.remedy,
    )


def _candidates(library: _Library) -> Iterator[str]:
    if library.module is not None:
        from importlib.util import find_spec

        found = find_spec(library.module)
        if found is not None and found.origin is not None:
            yield found.origin
    yield from library.names
