"""`tapfs scrub`: read all disks in use, and see that they still are what was hashed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from tapfs.cli.json_output import print_json
from tapfs.cli.parser import UsageError, add_rate_option
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of
from tapfs.cli.sizes import human_size
from tapfs.errors import CODES, ErrorKind, ImageError, from_os_error
from tapfs.extent import Range, merge_runs

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from tapfs.cli.parser import Subparsers
    from tapfs.jobs.pace import Pace

#: Ranges of one disk that are printed; --json has all.
_MOST_PRINTED = 50
_DAMAGED = CODES[ErrorKind.CORRUPT].exit_code
#: Seconds for which a process may be silent.
_ANSWER_SECONDS = 60.0


class DiskInUse(NamedTuple):
    """A disk that a process of this user serves: what to call it, and how its process is asked for a step."""

    name: str
    ask: Callable[[int], dict[str, Any] | None]


class Scrubbed(NamedTuple):
    """What scrubbing a disk has found. `verdict`: "same", "damaged", "changed", "readable" (without a sidecar)."""

    name: str
    path: str
    sidecar: str | None
    verdict: str
    read: int
    differing: list[Range]
    unreadable: list[tuple[Range, str]]


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "scrub",
        help="read all disks in use, and compare them with their sidecars",
        description="Have the process behind each mount, served disk, block device and guest's disk of this user read\n"
        "its disk, a piece at a time, while it is used. A disk with a sidecar ('tapfs hash') is compared with it; of\n"
        "others it is seen that all can be read. What the host has in memory is taken from there.\n"
        "Exit code: 0 all as hashed, or readable; 1 something changed since; 2 damaged or unreadable; others:\n"
        "'tapfs --help'.",
    )
    parser.add_argument("--mounted", action="store_true", help="all disks in use: there is no other choice yet")
    add_rate_option(parser, "read")
    add_json_option(parser)
    add_progress_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Scrub one disk after the other."""
    if not arguments.mounted:
        raise UsageError("say --mounted (an image that is not in use: tapfs verify IMAGE)", "tapfs scrub")
    from tapfs.cli.guard import complain
    from tapfs.jobs.pace import Pace

    pace = Pace(arguments.rate_limit)
    found: list[Scrubbed] = []
    failures: list[ImageError] = []
    for disk in disks_in_use():
        try:
            with progress_of(arguments, "scrub") as progress:
                found.append(scrub(disk, pace, progress))
        except ImageError as error:
            failures.append(error)
            complain("tapfs", f"{disk.name}: {error}")
        else:
            if not arguments.json and not arguments.quiet:
                _print(found[-1])
    if arguments.json:
        print_json({"disks": [_as_json(each) for each in found], "failed": len(failures)})
    elif not found and not failures and not arguments.quiet:
        print_line("no disk is in use")
    codes = [CODES[error.kind].exit_code for error in failures]
    if any(each.verdict == "damaged" for each in found):
        return _DAMAGED
    return codes[0] if codes else int(any(each.verdict == "changed" for each in found))


def disks_in_use() -> Iterator[DiskInUse]:
    """All that processes of this user serve."""
    from tapfs.fuse.registry import all_mounts
    from tapfs.serving.served_record import records as served_records
    from tapfs.ublk.record import directory, records, socket_name

    for registry, entry in all_mounts():
        if entry.alive:
            yield _asked(entry.mountpoint, registry.directory, registry.socket_name(entry.pid))
    for folder, served in served_records():
        yield _asked(served.address, folder, served.socket_name)
    for device in records():
        yield _asked(f"/dev/ublkb{device.number}", directory(), socket_name(device.number))
    yield from _disks_of_guests()


def scrub(disk: DiskInUse, pace: Pace, progress: Callable[[int, int], None]) -> Scrubbed:
    """Ask for steps until the end of the disk. Raises ImageError if its process does not answer."""
    offset = read = 0
    differing: list[Range] = []
    unreadable: list[tuple[Range, str]] = []
    while True:
        said = disk.ask(offset)
        if said is None:
            raise ImageError(ErrorKind.IO, "its process ended before it had answered", op="scrub")
        read += said["read"]
        differing += [Range(*each) for each in said["differ"]]
        unreadable += [(Range(start, length), message) for start, length, message in said["unreadable"]]
        progress(said["until"], said["size"])
        if said["until"] >= said["size"] or said["until"] <= offset:
            break
        offset = said["until"]
        pace.moved(said["read"])
    if said["sidecar"] is None:
        verdict = "damaged" if unreadable else "readable"
    else:
        verdict = ("damaged" if said["untouched"] or unreadable else "changed") if differing else "same"
    joined = list(merge_runs(differing, _joined))
    return Scrubbed(disk.name, said["path"], said["sidecar"], verdict, read, joined, unreadable)


def _asked(name: str, directory: Path, socket: str) -> DiskInUse:
    return DiskInUse(name, partial(_ask, name, directory, socket))


def _ask(name: str, directory: Path, socket: str, offset: int) -> dict[str, Any] | None:
    from tapfs.serving.asking import ask_and_block

    try:
        return ask_and_block(directory, socket, "scrub", seconds=_ANSWER_SECONDS, offset=offset)
    except ImageError:
        raise
    except OSError as error:
        raise from_os_error(error, path=name, op="ask its process") from error


def _disks_of_guests() -> Iterator[DiskInUse]:
    """Those of Xen guests; none where there is no Xen, or where it is not for this user to see."""
    from tapfs.xen.host import find_host

    try:
        find_host()
    except ImageError:
        return
    from tapfs.cli.guests.device import with_xenstore
    from tapfs.xen.device import our_devices
    from tapfs.xen.runtime_files import directory, socket_name

    for device in with_xenstore(lambda store, _host: our_devices(store)):
        yield _asked(str(device), directory(), socket_name(device))


def _print(found: Scrubbed) -> None:
    for offset, length in found.differing[:_MOST_PRINTED]:
        print_line(f"differs: bytes {offset} to {offset + length} ({human_size(length)})")
    for (offset, length), message in found.unreadable[:_MOST_PRINTED]:
        print_line(f"cannot be read: bytes {offset} to {offset + length}: {message}")
    words = {
        "same": "the disk is as it was hashed",
        "readable": "all can be read; there is no sidecar to compare it with",
        "changed": "changed since it was hashed",
        "damaged": "damaged",
    }[found.verdict]
    print_line(f"{found.name}: {found.path}: {words} ({human_size(found.read)} read)")


def _as_json(found: Scrubbed) -> dict[str, object]:
    return {
        "name": found.name,
        "path": found.path,
        "sidecar": found.sidecar,
        "verdict": found.verdict,
        "read_bytes": found.read,
        "differing": [{"offset": offset, "length": length} for offset, length in found.differing],
        "unreadable": [
            {"offset": part.offset, "length": part.length, "message": message} for part, message in found.unreadable
        ],
    }


def _joined(left: Range, right: Range) -> Range | None:
    return Range(left.offset, right.end - left.offset) if left.end == right.offset else None
