"""The end of an Image that nobody closed: its files are closed, and its program is told."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tapfs.disk.engine_chain import EngineChain
    from tapfs.disk.write_path import WritePath


def close_dropped(chain: EngineChain, writes: WritePath | None, opened_by: int) -> None:
    """Close the files of an Image that nobody refers to any more, and warn if it was opened in this process."""
    if chain.closed:
        return
    try:
        if os.getpid() == opened_by:
            unflushed = 0 if writes is None else writes.unflushed_bytes
            lost = f"; {unflushed} bytes of its metadata were not flushed and are lost" if unflushed else ""
            warnings.warn(f"unclosed disk image {chain.top.path!r}{lost}", ResourceWarning, stacklevel=2)
    finally:
        chain.close()
