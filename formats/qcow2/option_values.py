"""The values of `-o` options that `create` and `amend` of qcow2 have in common, by their words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tapfs.formats.qcow2.header import COMPRESSION_DEFLATE, COMPRESSION_ZSTD

COMPAT: Mapping[str, int] = MappingProxyType({"0.10": 2, "v2": 2, "1.1": 3, "v3": 3})
COMPRESSION: Mapping[str, int] = MappingProxyType({"zlib": COMPRESSION_DEFLATE, "zstd": COMPRESSION_ZSTD})
SWITCH: Mapping[str, bool] = MappingProxyType({"on": True, "off": False})
#: The bits of a reference count, as the header's power of two.
REFCOUNT_ORDER: Mapping[str, int] = MappingProxyType({str(1 << order): order for order in range(7)})
