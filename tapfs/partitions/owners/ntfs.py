"""The files of NTFS that lie in ranges: each record of the master file table has its runs and its name.

No directory is read: a record names the record of the directory that it lies in.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tapfs.errors import ImageError
from tapfs.extent import Range
from tapfs.partitions.free_space.ntfs_records import (
    DATA,
    Attribute,
    MasterFileTable,
    Volume,
    attributes,
    read_volume,
    restored,
    runs_in,
)
from tapfs.partitions.owners.search import Search

_FILE_NAME, _INDEX = 0x30, 0xA0
_IN_USE = 0x1
_ROOT = 5
_NUMBER = (1 << 48) - 1
#: The namespace of the short names of DOS, which stand beside long ones.
_DOS = 2
_MOST_STEPS = 256
_PIECE = 1 << 20


def ntfs_owners(search: Search) -> None:
    """Say to the search which files lie in its ranges."""
    try:
        volume = read_volume(search.disk)
    except ImageError as error:
        search.note(f"the boot sector makes no sense: {error.message}")
        return
    _Ntfs(search, volume).run()


class _Ntfs:
    def __init__(self, search: Search, volume: Volume) -> None:
        self._search = search
        self._volume = volume
        #: The names of each record: that of the directory, and its own in there.
        self._names: dict[int, list[tuple[int, str]]] = {}

    def run(self) -> None:
        cluster = self._volume.cluster_size
        for place, raw in self._records(self._table()):
            if raw[:4] not in {b"FILE", b"BAAD"} or not raw[22] & _IN_USE:
                continue
            number, offset = place
            self._search.file_has(number, offset, len(raw), "inode")
            try:
                record = restored(raw, f"record {number}")
                found = list(attributes(record))
            except ImageError as error:
                self._search.note(error.message)
                continue
            base = int.from_bytes(record[32:38], "little") or number
            for each in found:
                if each.kind == _FILE_NAME and each.resident:
                    self._note_name(base, each)
                elif not each.resident:
                    part = {DATA: "data", _INDEX: "directory"}.get(each.kind, "map")
                    for run in self._runs(number, each):
                        self._search.file_has(base, run.offset * cluster, run.length * cluster, part)
        for number in self._search.unnamed:
            for parent, name in self._names.get(number, []):
                self._search.named(number, self._path(parent, name))

    def _table(self) -> list[Range]:
        """The runs of the master file table, in clusters; where its own record is damaged, those of its copy."""
        try:
            return MasterFileTable(self._search.disk, self._volume).runs
        except ImageError as error:
            self._search.note(f"the first record of the master file table: {error.message}; its copy was taken")
        mirror = self._volume._replace(table_cluster=self._volume.mirror_cluster)
        raw = self._search.read(
            mirror.table_cluster * mirror.cluster_size, mirror.record_size, "the copy of the master file table"
        )
        try:
            found = [] if raw is None else list(attributes(restored(raw, "the copy of record 0")))
        except ImageError as error:
            self._search.note(error.message)
            return []
        return [run for each in found if each.kind == DATA and not each.resident for run in self._runs(0, each)]

    def _records(self, runs: list[Range]) -> Iterator[tuple[tuple[int, int], bytes]]:
        """The records of the table as they lie there, each with its number and its place in the partition."""
        size, cluster = self._volume.record_size, self._volume.cluster_size
        number = 0
        for run in runs:
            start, length = run.offset * cluster, run.length * cluster
            for at in range(0, length - size + 1, _PIECE):
                count = min(_PIECE, length - at) // size * size
                yield from self._piece(start + at, count, number + at // size)
            number += length // size

    def _piece(self, start: int, count: int, number: int) -> Iterator[tuple[tuple[int, int], bytes]]:
        size = self._volume.record_size
        before = len(self._search.notes)
        whole = self._search.read(start, count, "the master file table")
        if whole is None:
            del self._search.notes[before:]
        for at in range(0, count, size):
            name = f"record {number + at // size}"
            raw = self._search.read(start + at, size, name) if whole is None else whole[at : at + size]
            if raw is not None:
                yield (number + at // size, start + at), raw
            else:
                self._search.file_has(number + at // size, start + at, size, "inode")

    def _runs(self, number: int, part: Attribute) -> list[Range]:
        try:
            return list(runs_in(part, self._volume.clusters))
        except ImageError as error:
            self._search.note(f"record {number}: {error.message}")
            return []

    def _note_name(self, number: int, attribute: Attribute) -> None:
        try:
            value = attribute.value
        except ImageError as error:
            self._search.note(f"record {number}: {error.message}")
            return
        if len(value) < 66:
            return
        (parent,) = struct.unpack_from("<Q", value)
        length, space = value[64], value[65]
        name = value[66 : 66 + 2 * length].decode("utf-16-le", "replace")
        names = self._names.setdefault(number, [])
        if space != _DOS or not names:
            names[:] = (
                [each for each in names if each[0] != parent & _NUMBER or space == _DOS] if space == _DOS else names
            )
            names.append((parent & _NUMBER, name))

    def _path(self, parent: int, name: str) -> str:
        """The path of a name, as far up as directories are known."""
        steps = [name]
        for _ in range(_MOST_STEPS):
            if parent == _ROOT:
                return "/" + "/".join(reversed(steps))
            above = self._names.get(parent)
            if not above:
                break
            parent, step = above[0]
            steps.append(step)
        return "<lost>/" + "/".join(reversed(steps))
