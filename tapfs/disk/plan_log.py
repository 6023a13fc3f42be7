"""The plan that a writer has not executed yet, kept where it outlives the writer's process.

If the process that serves a disk is killed, the guest continues with the next process. The guest then expects every
write that was acknowledged. The data of these writes is safe in the host's page cache. But the metadata that points to
the data existed only in the dead process. So a process keeps the plan of its next flush in a file in memory (tmpfs). It
adds to it with every commit, before anybody can rely on that commit. The next process executes the plan before it
opens the image. A crash of the host takes both the page cache and the plan, and leaves the image of the last flush.

What a commit adds is a record behind the plan (`tapfs.driver.Additive`), so it costs the same however much waits.
Where a driver cannot say it, or there is no room, the whole plan is kept anew. A record holds if its checksum does, if
it was made for the plan before it, and if all records before it hold. So one that a kill tore is no record.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.plan import Allocate, Copy, Discard, Grow, Plan, Shorten, Step, Write

#: Seconds from one sign of life to the next, and those after the last one in which a change was the process's own.
BEAT_SECONDS = 2
_GRACE_SECONDS = 10

#: The file: a page whose first byte says which record holds (0: none, 1, 2), then two records of equal room. One is
#: written while the other holds. A record: token, digest of the files' identities, bytes of the names and of the plan,
#: and a number that no other plan has; then the names of the files after the first, each ended by a zero byte, then the
#: plan. Behind it additions: a checksum of what follows, bytes of the plan that is added, the number of the plan, and
#: that of the addition; then that plan.
_PAGE = mmap.PAGESIZE
_RECORD = struct.Struct("=32s16sQQQ")
_CHECKSUM = struct.Struct("=I")
_ADDITION = struct.Struct("=IQQ")
_MIN_ROOM = 256 << 10

#: Step (1 write, 2 grow, 3 discard, 4 allocate, 5 copy, 6 shorten; 0: the next stage), file, host offset or size, and
#: length. A write's bytes follow, and the place that a copy is made from.
_STEP = struct.Struct("=BIQQ")
_NEXT_STAGE, _WRITE, _GROW, _DISCARD, _ALLOCATE, _COPY, _SHORTEN = range(7)
_SOURCE = struct.Struct("=Q")
_STAGE = _STEP.pack(_NEXT_STAGE, 0, 0, 0)


class PlannedFile(NamedTuple):
    """A host file that a plan writes: its path, and its device and inode, by which it is known to be the same."""

    path: str
    identity: tuple[int, int]


class KeptPlan(NamedTuple):
    """A plan that was left behind, the paths of the files after the first, and what tells that they are the same."""

    plan: Plan
    further_paths: tuple[str, ...]
    digest: bytes

    def is_for(self, identities: Sequence[tuple[int, int]]) -> bool:
        """Whether the plan was made for the files with these devices and inodes, in this order."""
        return self.digest == _digest(identities)


class PlanLog:
    """One file with at most one plan, which appears whole or not at all, whatever ends the process meanwhile.

    `token` is of one life of a disk: a plan with another is not ours, and the image may have changed since.
    """

    def __init__(self, path: Path, token: str) -> None:
        self._path = path
        self._token = token.encode()
        self._memory: mmap.mmap | None = None
        self._room = 0
        #: The number of the plan that is kept; where the next addition to it goes, the end of the room, and its number.
        self._number = int.from_bytes(os.urandom(7), "big")
        self._next = self._stop = self._additions = 0

    @property
    def path(self) -> Path:
        """Where the file is, or will be."""
        return self._path

    @property
    def token(self) -> str:
        """What tells this life of the disk from others."""
        return self._token.decode()

    @property
    def request_owner(self) -> int:
        """A number below 2**61 that all processes of this life of the disk have, and hardly another disk."""
        return int.from_bytes(hashlib.blake2b(self._token, digest_size=8).digest(), "big") >> 3

    @property
    def holds_plan(self) -> bool:
        """Whether there is a file that holds a plan, perhaps another's."""
        try:
            with self._path.open("rb") as file:
                return file.read(1) not in (b"", b"\0")
        except OSError:
            return False

    def keep(self, plan: Plan, files: Sequence[PlannedFile]) -> None:
        """Have this plan instead of the one before; `files` are the image's, by their numbers.

        Raises ImageError; the one before is still there then.
        """
        names = b"".join(os.fsencode(file.path) + b"\0" for file in files[1:])
        digest = _digest([file.identity for file in files])
        packed = _packed(plan)
        body = names + packed if names else packed
        # As much again for additions: to keep a large plan anew must become rare.
        memory = self._mapped(_RECORD.size + 2 * len(body))
        record = 2 if memory[0] == 1 else 1
        at = self._place(record)
        self._number += 1
        # No system call from here on: it would have this thread wait for others to let it go on.
        _RECORD.pack_into(memory, at, self._token, digest, len(names), len(packed), self._number)
        memory[at + _RECORD.size : at + _RECORD.size + len(body)] = body
        memory[0] = record
        self._next, self._stop, self._additions = at + _RECORD.size + len(body), at + self._room, 0

    def add(self, added: Plan) -> bool:
        """Add to the plan that is kept. False where there is none, or no room: then keep the whole plan.

        The stages of all additions to a plan are the same, empty ones too, and have writes and growth alone.
        """
        memory, at = self._memory, self._next
        packed = _packed(added)
        body = _ADDITION.pack(len(packed), self._number, self._additions) + packed
        end = at + _CHECKSUM.size + len(body)
        if memory is None or memory[0] == 0 or end > self._stop:
            return False
        memory[at:end] = _CHECKSUM.pack(zlib.crc32(body)) + body
        self._next, self._additions = end, self._additions + 1
        return True

    def clear(self) -> None:
        """The plan has been executed and is durable: have none."""
        if self._memory is not None:
            self._memory[0] = 0

    @property
    def exists(self) -> bool:
        """Whether there is a file, perhaps another's."""
        return self._path.exists()

    def kept(self) -> KeptPlan | None:
        """The plan that a predecessor of this life left, if there is one. Raises ImageError."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_os_error(error, path=str(self._path), op="read the plan of the last flush") from error
        if len(content) < _PAGE + 2 * _MIN_ROOM or content[0] not in (1, 2):
            return None
        room = (len(content) - _PAGE) // 2
        at = _PAGE + (content[0] - 1) * room
        token, digest, name_bytes, length, number = _RECORD.unpack_from(content, at)
        if token.rstrip(b"\0") != self._token:
            return None
        start = at + _RECORD.size
        names = content[start : start + name_bytes].split(b"\0")[:-1]
        end = start + name_bytes + length
        kept = _unpacked(content[start + name_bytes : end])
        added = merged_additions(_additions(content[end : at + room], number))
        whole = Plan((*kept.stages, *added.stages))
        return KeptPlan(whole, tuple(os.fsdecode(name) for name in names), digest)

    def beat(self) -> None:
        """Say that the process lives; to be called every BEAT_SECONDS. Without a plan there is nothing to say."""
        with suppress(OSError):
            os.utime(self._path)

    def require_unchanged(self, image: str) -> None:
        """Raise ImageError(exists) if `image` was changed long after the last beat, and so by somebody else."""
        try:
            changed, lived = os.stat(image).st_mtime, self._path.stat().st_mtime
        except OSError:
            return
        if changed > lived + _GRACE_SECONDS:
            raise ImageError(
                ErrorKind.EXISTS,
                "was changed after a server of it was killed, and what that server left may not fit any more",
                path=image,
                op="open",
                remedy=f"check the image, then remove {self._path}",
            )

    def move(self, path: Path) -> None:
        """Have the file at another place. Before the first plan is kept."""
        self._path = path

    def remove(self) -> None:
        """Remove the file, if there is one, with what is in it."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        with suppress(OSError):
            self._path.unlink()

    def close(self) -> None:
        """Let go of the file; it goes, too, if it holds no plan."""
        if self._memory is not None and self._memory[0] == 0:
            self.remove()

    def _place(self, record: int) -> int:
        return _PAGE + (record - 1) * self._room

    def _mapped(self, size: int) -> mmap.mmap:
        """The file with room for records of that many bytes."""
        if self._memory is not None and size <= self._room:
            return self._memory
        room = _MIN_ROOM
        while room < size:
            room *= 2
        try:
            return self._grown(room)
        except OSError as error:
            raise from_os_error(error, path=str(self._path), op="keep the plan of the next flush") from error

    def _grown(self, room: int) -> mmap.mmap:
        """A new file with more room, in place of the one there was, whose plan it has."""
        new = self._path.with_suffix(self._path.suffix + "-new")
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # Room that is only promised would end us by SIGBUS when there is none.
            os.posix_fallocate(descriptor, 0, _PAGE + 2 * room)
            memory = mmap.mmap(descriptor, _PAGE + 2 * room)
        except BaseException:
            new.unlink()
            raise
        finally:
            os.close(descriptor)
        old = self._memory
        if old is not None and old[0]:
            start = self._place(old[0])
            memory[_PAGE : _PAGE + self._room] = old[start : start + self._room]
            memory[0] = 1
        new.rename(self._path)
        if old is not None:
            old.close()
        self._memory, self._room = memory, room
        return memory


def _additions(content: bytes, number: int) -> Iterator[Plan]:
    """What was added to the plan of this number, up to the first addition that is not whole, or another plan's."""
    at = count = 0
    while at + _CHECKSUM.size + _ADDITION.size <= len(content):
        length, of, which = _ADDITION.unpack_from(content, at + _CHECKSUM.size)
        start = at + _CHECKSUM.size
        at = start + _ADDITION.size + length
        checked = at <= len(content) and zlib.crc32(content[start:at]) == _CHECKSUM.unpack_from(content, start - 4)[0]
        if not checked or (of, which) != (number, count):
            return
        yield _unpacked(content[start + _ADDITION.size : at])
        count += 1


def merged_additions(added: Iterable[Plan]) -> Plan:
    """One plan of additions, stage by stage: of writes that overlap the later ones count, and of growth the largest."""
    stages: list[list[Step]] = []
    for each in added:
        stages += [[] for _ in range(len(each.stages) - len(stages))]
        for number, steps in enumerate(each.stages):
            stages[number] += steps
    return Plan(tuple(tuple(_merged(stage)) for stage in stages if stage))


def _merged(steps: list[Step]) -> Iterator[Step]:
    ends: dict[int, int] = {}
    covered: dict[int, list[tuple[int, int]]] = {}
    for step in reversed(steps):
        if isinstance(step, Grow):
            ends[step.file] = max(ends.get(step.file, 0), step.size)
        elif isinstance(step, Write):
            file, at, data = step
            for start, stop in _uncovered(covered.setdefault(file, []), at, at + len(data)):
                yield Write(file, start, data[start - at : stop - at])
    yield from (Grow(file, size) for file, size in ends.items())


def _uncovered(covered: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of a range that are in none of these ranges, which are apart and ascend; then it is one of them."""
    first = bisect_left(covered, (start, start))
    if first and covered[first - 1][1] > start:
        first -= 1
    at, last = start, first
    found: list[tuple[int, int]] = []
    while last < len(covered) and covered[last][0] < stop:
        low, high = covered[last]
        if at < low:
            found.append((at, low))
        at = max(at, high)
        last += 1
    if at < stop:
        found.append((at, stop))
    joined = covered[first:last]
    covered[first:last] = [(min([start, *(low for low, _ in joined)]), max([stop, *(high for _, high in joined)]))]
    return found


def _digest(identities: Sequence[tuple[int, int]]) -> bytes:
    numbers = [number for identity in identities for number in identity]
    return hashlib.blake2b(struct.pack(f"={len(numbers)}Q", *numbers), digest_size=16).digest()


def _packed(plan: Plan) -> bytes:
    pieces: list[bytes] = []
    for stage in plan.stages:
        pieces.append(_STAGE)
        for step in stage:
            match step:
                case Write(file, host_offset, data):
                    pieces += (_STEP.pack(_WRITE, file, host_offset, len(data)), data)
                case Grow(file, size):
                    pieces.append(_STEP.pack(_GROW, file, size, 0))
                case Discard(file, host_offset, length):
                    pieces.append(_STEP.pack(_DISCARD, file, host_offset, length))
                case Allocate(file, host_offset, length):
                    pieces.append(_STEP.pack(_ALLOCATE, file, host_offset, length))
                case Copy(file, host_offset, source, length):
                    pieces += (_STEP.pack(_COPY, file, host_offset, length), _SOURCE.pack(source))
                case Shorten(file, size):
                    pieces.append(_STEP.pack(_SHORTEN, file, size, 0))
    return b"".join(pieces)


def _unpacked(body: bytes) -> Plan:
    stages: list[list[Step]] = []
    at = 0
    while at < len(body):
        kind, file, host_offset, length = _STEP.unpack_from(body, at)
        at += _STEP.size
        if kind == _NEXT_STAGE:
            stages.append([])
        elif kind == _WRITE:
            stages[-1].append(Write(file, host_offset, body[at : at + length]))
            at += length
        elif kind == _GROW:
            stages[-1].append(Grow(file, host_offset))
        elif kind == _SHORTEN:
            stages[-1].append(Shorten(file, host_offset))
        elif kind == _COPY:
            (source,) = _SOURCE.unpack_from(body, at)
            stages[-1].append(Copy(file, host_offset, source, length))
            at += _SOURCE.size
        elif kind == _ALLOCATE:
            stages[-1].append(Allocate(file, host_offset, length))
        else:
            stages[-1].append(Discard(file, host_offset, length))
    return Plan(tuple(tuple(stage) for stage in stages))
