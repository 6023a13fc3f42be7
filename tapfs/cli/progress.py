"""Progress for operators and for programs: a bar on a terminal, JSON lines on request, else silence."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from types import TracebackType
from typing import Self, TextIO

from tapfs.disk.json_text import VERSION


class ProgressMode(StrEnum):
    """AUTO: a bar if stderr is a terminal. JSON: lines on stderr, terminal or not. NONE: silence."""

    AUTO = "auto"
    JSON = "json"
    NONE = "none"


class Progress:
    """A callback ``(done, total)`` in bytes, or another `unit`, as convert and check take it, and a context.

    A bar appears after one second, with `early` at once, and then at the end in any case. It is wiped away when the
    context ends with an exception, so that the error line stands alone. JSON lines come at most four times a second,
    and one last line says that everything is done; after a failure there is no such line.
    """

    BAR_AFTER_SECONDS = 1.0
    BAR_EVERY_SECONDS = 0.1
    JSON_EVERY_SECONDS = 0.25

    def __init__(
        self,
        operation: str,
        mode: ProgressMode = ProgressMode.AUTO,
        *,
        early: bool = False,
        unit: str = "bytes",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._operation = operation
        self._unit = unit
        self._early = early
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._draw: Callable[[], None] | None = None
        self._every = 0.0
        if mode is ProgressMode.JSON:
            self._draw, self._every = self._draw_json, self.JSON_EVERY_SECONDS
        elif mode is ProgressMode.AUTO and self._stream.isatty():
            self._draw, self._every = self._draw_bar, self.BAR_EVERY_SECONDS
        self._started = clock()
        self._bar_shown = False
        delay = 0.0 if mode is ProgressMode.JSON or early else self.BAR_AFTER_SECONDS
        self._next = self._started + delay
        self._done = 0
        self._total = 0

    def __enter__(self) -> Self:
        self._started = self._clock()
        return self

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes are behind us."""
        self._done, self._total = done, total
        if self._draw is None:
            return
        now = self._clock()
        if now >= self._next and done < total:
            self._next = now + self._every
            self._draw()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._draw is None:
            return
        if error is None and (self._draw == self._draw_json or self._bar_shown or self._early):
            self._done = self._total
            self._draw()
        if self._bar_shown:
            self._stream.write("\n" if error is None else "\r\x1b[K")
            self._stream.flush()

    def _draw_json(self) -> None:
        import json  # most conversions show nothing

        line = {"version": VERSION, "operation": self._operation, "done": self._done, "total": self._total}
        line["unit"] = self._unit
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def _draw_bar(self) -> None:
        share = self._done / self._total if self._total else 1.0
        elapsed = max(self._clock() - self._started, 1e-6)
        if share >= 1.0:
            time_text = f"in {_duration(elapsed)}"
        elif share > 0:
            time_text = f"{_duration(elapsed / share - elapsed)} left"
        else:
            time_text = ""
        speed = self._done / elapsed
        rate = f"{speed / (1 << 20):.0f} MiB/s" if self._unit == "bytes" else f"{speed:.0f} {self._unit}/s"
        tail = f" {share:4.0%} {rate} {time_text}"
        columns = self._columns()
        width = min(40, columns - len(self._operation) - len(tail) - 4)
        bar = ""
        if width >= 5:
            filled = int(width * share)
            bar = f" [{'#' * filled}{'.' * (width - filled)}]"
        self._stream.write(f"\r{f'{self._operation}{bar}{tail}'[: columns - 1]}\x1b[K")
        self._stream.flush()
        self._bar_shown = True

    def _columns(self) -> int:
        """The width of the terminal that the bar is on; standard output may lead elsewhere."""
        said = os.environ.get("COLUMNS", "")
        with suppress(OSError, ValueError):
            return (int(said) if said.isdecimal() else 0) or os.get_terminal_size(self._stream.fileno()).columns or 80
        return 80


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
