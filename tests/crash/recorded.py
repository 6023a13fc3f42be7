"""Record by strace the calls of a program that change one file, or a few of them, and replay them.

strace stands outside tapfs: what it saw is what reached the kernel, in which order. The model
of the disk is the harsh one: whatever was not followed by an fdatasync that returned may be
there or not, sector by sector.
"""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512

_TRACED = "pwrite64,pwritev,pwritev2,fdatasync,fsync,ftruncate,fallocate,write"
_CALL = re.compile(r"^\d+\s+(?P<name>\w+)\((?P<arguments>.*)\)\s+=\s+(?P<result>-?\d+)")
_HEX = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True, slots=True)
class HostWrite:
    """Bytes written at an offset of the file."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class HostSize:
    """The file was made this long."""

    size: int


@dataclass(frozen=True, slots=True)
class HostZero:
    """A range was punched or zeroed, the length kept."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Barrier:
    """An fdatasync or fsync returned 0."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The program wrote this line to its marks: where it stands."""

    text: str


Event = HostWrite | HostSize | HostZero | Barrier | Mark


def record(command: Sequence[str], image: Path, marks: Path, log: Path) -> list[Event]:
    """Run `command` under strace; its events on `image` and its lines in `marks`, in order."""
    strace = ["strace", "-f", "-qq", "-y", "-xx", "-s", str(8 << 20), "-e", f"trace={_TRACED}", "-o", str(log)]
    subprocess.run([*strace, *command], check=True)
    image_hex, marks_hex = (_as_strace_prints(path) for path in (image, marks))
    events = list(_events(_joined(log.read_text().splitlines()), image_hex, marks_hex))
    assert any(isinstance(event, Barrier) for event in events), "strace saw no barrier: it traced nothing"
    return events


def record_files(command: Sequence[str], images: Sequence[Path], log: Path) -> list[tuple[int, Event]]:
    """Run `command` under strace; its events on several files, in order, each with the number of its file."""
    strace = ["strace", "-f", "-qq", "-y", "-xx", "-s", str(8 << 20), "-e", f"trace={_TRACED}", "-o", str(log)]
    subprocess.run([*strace, *command], check=True)
    lines = list(_joined(log.read_text().splitlines()))
    names = [_as_strace_prints(path) for path in images]
    found: list[tuple[int, Event]] = []
    for line in lines:
        for number, name in enumerate(names):
            found += [(number, event) for event in _events(iter([line]), name, "no marks")]
    assert any(isinstance(event, Barrier) for _, event in found), "strace saw no barrier: it traced nothing"
    return found


def crashes_of_files(
    starts: Sequence[bytes], events: Sequence[tuple[int, Event]], generator: random.Random, tries: int
) -> Iterator[tuple[int, list[bytes]]]:
    """Contents of several files that a power failure can leave: before and after every barrier of any of them.

    A barrier makes one file durable. What others were written since their own last barrier may be there or not.
    """
    durable = [Platter(start) for start in starts]
    volatile: list[list[Event]] = [[] for _ in starts]
    for index, (number, event) in enumerate(events):
        if not isinstance(event, Barrier):
            volatile[number].append(event)
            continue
        for _ in range(tries):
            torn = [Platter(bytes(each.content)) for each in durable]
            for each, waiting in zip(torn, volatile, strict=True):
                for step in waiting:
                    each.apply_torn(step, generator)
            yield index, [bytes(each.content) for each in torn]
        for step in volatile[number]:
            durable[number].apply(step)
        volatile[number].clear()
        yield index + 1, [bytes(each.content) for each in durable]


def _as_strace_prints(path: Path) -> str:
    return "".join(f"\\x{byte:02x}" for byte in bytes(path.resolve()))


def _joined(lines: Sequence[str]) -> Iterator[str]:
    """Calls that strace split over two lines as one; a call counts when it returns."""
    started: dict[str, str] = {}
    for line in lines:
        thread = line.split(maxsplit=1)[0]
        if line.endswith("<unfinished ...>"):
            started[thread] = line.removesuffix("<unfinished ...>")
        elif "resumed>" in line:
            yield started.pop(thread) + line.split("resumed>", 1)[1]
        else:
            yield line


def _events(lines: Iterator[str], image: str, marks: str) -> Iterator[Event]:
    for line in lines:
        match = _CALL.match(line)
        if match is None or int(match["result"]) < 0:
            continue
        name, arguments = match["name"], match["arguments"]
        target = arguments.split(",", 1)[0]
        if marks in target and name == "write":
            yield Mark(_payload(arguments).decode().strip())
        if image not in target:
            continue
        numbers = arguments.split(", ")
        match name:
            case "pwrite64":
                yield HostWrite(int(numbers[-1]), _payload(arguments)[: int(match["result"])])
            case "pwritev" | "pwritev2":
                offset = int(re.findall(r", (\d+)", arguments)[-1 if name == "pwritev" else -2])
                yield HostWrite(offset, _payload(arguments)[: int(match["result"])])
            case "fdatasync" | "fsync":
                yield Barrier()
            case "ftruncate":
                yield HostSize(int(numbers[-1]))
            case "fallocate":
                if "PUNCH_HOLE" in arguments or "ZERO_RANGE" in arguments:
                    yield HostZero(int(numbers[-2]), int(numbers[-1]))
                else:  # space that is taken, which changes neither bytes nor length
                    assert "KEEP_SIZE" in arguments, line
            case _:
                raise AssertionError(f"an unforeseen write to the image: {line[:200]}")


def _payload(arguments: str) -> bytes:
    strings = _HEX.findall(arguments.split(">", 1)[1])
    return bytes.fromhex("".join(strings).replace("\\x", ""))


class Platter:
    """The bytes of a file, changed event by event."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)

    def apply(self, event: Event) -> None:
        """Let an event happen whole."""
        match event:
            case HostWrite(offset, data):
                self._reach(offset + len(data))
                self.content[offset : offset + len(data)] = data
            case HostSize(size):
                self._reach(size)
                del self.content[size:]
            case HostZero(offset, length):
                end = min(offset + length, len(self.content))
                self.content[offset:end] = bytes(max(0, end - offset))
            case _:
                pass

    def apply_torn(self, event: Event, generator: random.Random) -> None:
        """Let an event happen, happen in part (sector by sector), or not happen."""
        if not isinstance(event, HostWrite):
            if generator.random() < 0.5:
                self.apply(event)
            return
        chance = generator.choice((0.0, 0.5, 1.0))
        at = event.offset
        while at < event.offset + len(event.data):
            end = min(at - at % SECTOR + SECTOR, event.offset + len(event.data))
            if generator.random() < chance:
                self.apply(HostWrite(at, event.data[at - event.offset : end - event.offset]))
            at = end

    def _reach(self, size: int) -> None:
        if len(self.content) < size:
            self.content.extend(bytes(size - len(self.content)))


def crashes(start: bytes, events: Sequence[Event], generator: random.Random, tries: int) -> Iterator[tuple[int, bytes]]:
    """Contents that a power failure can leave: ``(events that had happened, file content)``.

    Before and after every barrier, and wherever the program believes that something is durable:
    what the last barrier made durable is there, of what came after it a random part.
    """
    durable = Platter(start)
    volatile: list[Event] = []
    for index, event in enumerate(events):
        if isinstance(event, Barrier | Mark):
            sure = isinstance(event, Mark) and event.text == "acknowledged"
            for _ in range(tries if isinstance(event, Barrier) or sure else 0):
                torn = Platter(bytes(durable.content))
                for waiting in volatile:
                    torn.apply_torn(waiting, generator)
                yield index + sure, bytes(torn.content)
        if isinstance(event, Barrier):
            for waiting in volatile:
                durable.apply(waiting)
            volatile.clear()
            yield index + 1, bytes(durable.content)
        elif not isinstance(event, Mark):
            volatile.append(event)
