"""The finder of tapfs's own modules: it takes their byte code from where Python keeps it, with few calls of the host.

A command loads 150 modules, each from a folder that is known. Python's own search asks for every kind of file that a
module may be, and costs a tenth of the start. What is not as it usually is (no byte code, an older one, another
kind of file) is left to that search.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import BuiltinImporter, ModuleSpec, SourceFileLoader
from importlib.util import MAGIC_NUMBER
from types import CodeType, ModuleType

_marshal = __import__("marshal")  # its public name loads more than it

_PACKAGE = "tapfs."
#: The start of byte code that names the time and the length of its source.
_HEAD = MAGIC_NUMBER + bytes(4)
_HEAD_BYTES = 16
#: Byte code that is not shorter is left to Python.
_MOST_BYTES = 64 << 10


class _Loader(SourceFileLoader):
    """Python's own, whose byte code is at a place that is known."""

    def __init__(self, name: str, path: str, cached: str, status: os.stat_result) -> None:
        super().__init__(name, path)
        self._cached = cached
        self._source = (int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)

    def get_code(self, fullname: str) -> CodeType | None:
        """The code of the module."""
        try:
            descriptor = os.open(self._cached, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return super().get_code(fullname)
        try:
            data = os.read(descriptor, _MOST_BYTES)
        finally:
            os.close(descriptor)
        time, length = self._source
        head = _HEAD + time.to_bytes(4, "little") + length.to_bytes(4, "little")
        if not data.startswith(head) or len(data) == _MOST_BYTES:
            return super().get_code(fullname)
        code: CodeType = _marshal.loads(memoryview(data)[_HEAD_BYTES:])
        return code


class _Finder:
    """Finds modules and packages of tapfs; a `importlib.abc.MetaPathFinder`."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """The spec of a module below tapfs that is a source file; None: Python is to look for it."""
        del target
        if not path or not fullname.startswith(_PACKAGE):
            return None
        folder, name = path[0], fullname.rpartition(".")[2]
        package = f"{folder}/{name}"
        for place, kind in ((f"{package}.py", name), (f"{package}/__init__.py", "__init__")):
            try:
                status = os.stat(place)
            except OSError:
                continue
            cached = f"{place[: -len(kind) - 3]}__pycache__/{kind}.{sys.implementation.cache_tag}.pyc"
            spec = ModuleSpec(fullname, _Loader(fullname, place, cached, status), origin=place)
            spec.submodule_search_locations = None if kind == name else [package]
            spec.has_location = True
            spec.cached = cached
            return spec
        return None


def install() -> None:
    """Have the modules of tapfs found so in this process, unless Python was told to keep byte code elsewhere."""
    if sys.implementation.cache_tag and sys.pycache_prefix is None and not sys.flags.optimize:
        own = (at for at, finder in enumerate(sys.meta_path) if finder is BuiltinImporter)
        sys.meta_path.insert(next(own, 0), _Finder)
