"""The map of a chain as text: the numbers of thousands of runs are put between words in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.chain_map import MappedRun, Runs
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData

#: Bytes of text that one call makes.
_TEXT_BYTES = 256 << 10
#: So many bytes are left for the words of one line.
_MAX_WORDS = 128 << 10


class Words(NamedTuple):
    """What the lines of like runs say besides numbers; `place` is for a table, instead of a host offset."""

    words: str
    place: str = ""


class MapLines:
    """Makes lines of runs. `words` is asked once for each kind of run; None: such runs have no line."""

    def __init__(self, words: Callable[[MappedRun], Words | None], *, json: bool) -> None:
        self._words = words
        self._json = json
        self._text = ffi.new("char[]", _TEXT_BYTES)
        self._shapes: list[tuple[int | bytes | CData, ...]] = []
        self._array = ffi.new("tapfs_line_shape[]", 0)
        self._alive: list[CData] = []

    def of(self, runs: Runs) -> Iterator[str]:
        """The lines of the runs, in pieces: rows that end with a line break, or objects that begin with a comma."""
        used = ffi.new("size_t *")
        done = 0
        while done < runs.length:
            part = lib.tapfs_map_lines(
                runs.array + done,
                runs.length - done,
                self._array,
                len(self._shapes),
                self._json,
                self._text,
                _TEXT_BYTES,
                used,
            )
            done += part
            if used[0]:
                yield str(ffi.buffer(self._text, used[0])[:], "utf-8", "surrogateescape")
            elif part == 0:
                self._learn(Runs(runs.array + done, 1).tuples()[0])

    def _learn(self, run: tuple[int, int, int, int, int, int, int]) -> None:
        mapped = MappedRun(*run)
        words = self._words(mapped)
        texts = [self._kept(text) for text in words or Words("")]
        self._shapes.append((mapped.layer, mapped.file, mapped.kind, mapped.placed, words is None, bytes(5), *texts))
        self._array = ffi.new("tapfs_line_shape[]", self._shapes)

    def _kept(self, text: str) -> CData:
        raw = text.encode("utf-8", "surrogateescape")
        if len(raw) > _MAX_WORDS // 2:
            raise ValueError("the words of a line are too long")
        kept = ffi.new("char[]", raw)
        self._alive.append(kept)
        return kept
