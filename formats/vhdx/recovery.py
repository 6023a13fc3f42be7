"""The replay of a log: the plan that makes the metadata what the log says (docs/specs/vhdx.md, "Log").

What the plan makes durable, in this order:

1. a header that says the file has changed (FileWriteGuid), and still names the log: a replay that is cut off is
   begun again by the next opening, and writes the same bytes;
2. the length that the newest entry says the file has;
3. ranges of zeros;
4. pages, each as its last change leaves it;
5. a header without a log, twice.
"""

from __future__ import annotations

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vhdx.guids import NO_GUID, new_guid
from tapfs.formats.vhdx.header import Headers, header_steps
from tapfs.formats.vhdx.log_entry import LoggedPage, ZeroRange
from tapfs.formats.vhdx.log_scan import Entry, Log
from tapfs.formats.vhdx.units import MAX_FILE_BYTES
from tapfs.plan import Grow, Plan, Write, plan

#: A log that makes more bytes zero, all in all, is refused: no resize of a block table comes near.
_MAX_ZERO_BYTES = 1 << 30
_ZEROS = bytes(1 << 20)


def recovery_plan(file: HostFile, headers: Headers, *, changes_file: bool) -> Plan:
    """The plan that replays the log of a file whose header names one.

    `changes_file`: it will be executed. A reader, who lays it over the file, sees the GUID that the file has.
    Raises ImageError: corrupt where the log has no valid entry or the file is shorter than the log says.
    """
    header, slot = headers.current, headers.slot
    log = Log(file, header)
    sequence = log.newest_sequence()
    if not sequence:
        raise ImageError(
            ErrorKind.CORRUPT,
            "the log waits to be replayed, and no entry of it is whole: metadata may be lost",
            path=file.path,
            offset=header.log_offset,
            op="replay the log",
        )
    newest = sequence[-1].header
    size = file.size()
    if newest.flushed_bytes > size:
        raise ImageError(
            ErrorKind.CORRUPT,
            f"the file has been cut: it has {size} bytes, and had {newest.flushed_bytes} when its log was written",
            path=file.path,
            offset=size,
            op="replay the log",
        )
    if newest.last_bytes > MAX_FILE_BYTES:
        raise ImageError(
            ErrorKind.CORRUPT,
            f"the log says that the file has {newest.last_bytes:#x} bytes",
            path=file.path,
            offset=header.log_offset + sequence[-1].offset,
            op="replay the log",
        )
    zeros, pages = _final_changes(file, log, sequence)
    file_write = new_guid() if changes_file else header.file_write
    begun = header._replace(sequence=header.sequence + 1, file_write=file_write)
    ended = begun._replace(sequence=header.sequence + 2, log=NO_GUID)
    return plan(
        header_steps(begun, 1 - slot),
        [Grow(0, max(newest.last_bytes, *(at + len(data) for at, data in pages), 0))],
        [Write(0, at, _ZEROS[: end - at]) for start, stop in zeros for at, end in _pieces(start, min(stop, size))],
        [Write(0, at, data) for at, data in pages],
        header_steps(ended, slot),
        header_steps(ended._replace(sequence=header.sequence + 3), 1 - slot),
    )


def _final_changes(file: HostFile, log: Log, sequence: list[Entry]) -> tuple[list[tuple[int, int]], list[LoggedPage]]:
    """The ranges ``(start, end)`` that become zeros, and then the pages, each as it is at the end."""
    zeros: list[tuple[int, int]] = []
    pages: dict[int, LoggedPage] = {}
    zero_bytes = 0
    for entry in sequence:
        for change in log.changes(entry):
            if isinstance(change, LoggedPage):
                pages[change.offset] = change
                continue
            zeros.append((change.offset, change.end))
            zero_bytes += max(0, min(change.end, file.size()) - change.offset)
            if zero_bytes > _MAX_ZERO_BYTES:
                raise ImageError(
                    ErrorKind.OUT_OF_BOUNDS,
                    f"the log makes more than {_MAX_ZERO_BYTES} bytes zero",
                    path=file.path,
                    op="replay the log",
                )
            pages = _without(pages, change)
    return zeros, [pages[at] for at in sorted(pages)]


def _without(pages: dict[int, LoggedPage], zeros: ZeroRange) -> dict[int, LoggedPage]:
    return {at: page for at, page in pages.items() if not zeros.offset <= at < zeros.end}


def _pieces(start: int, end: int) -> list[tuple[int, int]]:
    return [(at, min(end, at + len(_ZEROS))) for at in range(start, end, len(_ZEROS))]
