"""`tapfs stats`: what is asked of disks in use, as a table, as JSON, or for Prometheus."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_disk_options, names_device
from tapfs.cli.json_output import print_json
from tapfs.cli.parser import UsageError
from tapfs.cli.reporting import add_json_option, print_columns, print_line

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.measuring import Measured
    from tapfs.cli.parser import Subparsers

_PROGRAM = "tapfs stats"

#: Column, and the counter of the disk's process that it shows.
_COUNTERS = {
    "READS": "reads",
    "WRITES": "writes",
    "FLUSHES": "flushes",
    "DISCARDS": "discards",
    "READ": "read_bytes",
    "WRITTEN": "written_bytes",
    "ERRORS": "errors",
    "MERGED": "merged",
    "IN FLIGHT": "in_flight",
}

_DESCRIPTION = """\
Show what was asked of the disks of guests, of block devices, of served disks and of mounts since the
process of each was started: requests, bytes READ and WRITTEN, requests answered with ERRORS, requests
MERGED with the one before, and those IN FLIGHT now. '-': the process does not answer, or does not
count it (the kernel serves the disk of some mounts by itself). With --json all its counters, and for
each kind of request a histogram of how long it took.

With --prometheus it is the text exposition of Prometheus (docs/monitoring.md): on standard output, in
a file for the node exporter's textfile collector, or by HTTP for whoever asks:
  tapfs stats --prometheus --output /var/lib/prometheus/node-exporter/tapfs.prom
  tapfs stats --prometheus --listen 127.0.0.1:9753"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("stats", help="count what is asked of disks in use", description=_DESCRIPTION)
    add_disk_options(parser)
    parser.add_argument("--interval", metavar="S", type=float, help="look again every S seconds, until interrupted")
    parser.add_argument("--prometheus", action="store_true", help="for Prometheus, as its text exposition")
    add_json_option(parser, file="with --prometheus: replace FILE, whole, instead of printing")
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        help="with --prometheus: answer GET /metrics at HOST:PORT or at a Unix socket (a path with a slash)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what is asked for; once, or again and again."""
    from tapfs.cli.measuring import measured

    _require_sense(arguments)
    if arguments.listen is not None:
        return _listen(arguments)
    while True:
        disks = measured(arguments)
        if arguments.prometheus:
            _write(arguments.output, _exposition(disks))
        elif arguments.json:
            print_json([{**disk.data, "operations": disk.operations} for disk in disks])
        else:
            print_columns([("DOMAIN", "DISK", *_COUNTERS), *map(_row, disks)])
        if arguments.interval is None:
            return 0
        if arguments.output is None:
            print(flush=True)
        time.sleep(arguments.interval)


def _require_sense(arguments: argparse.Namespace) -> None:
    names_device(arguments, _PROGRAM)
    if arguments.interval is not None and not 0 < arguments.interval < 1 << 20:
        raise UsageError("--interval must be a number of seconds", _PROGRAM)
    if arguments.prometheus and arguments.json:
        raise UsageError("say either --prometheus or --json", _PROGRAM)
    if not arguments.prometheus and (arguments.output is not None or arguments.listen is not None):
        raise UsageError("--output and --listen go with --prometheus", _PROGRAM)
    if arguments.listen is not None and (arguments.output is not None or arguments.interval is not None):
        raise UsageError("--listen goes with neither --output nor --interval", _PROGRAM)


def _exposition(disks: list[Measured]) -> str:
    from tapfs import __version__
    from tapfs.cli.prometheus_text import exposition

    return exposition(disks, __version__)


def _write(path: str | None, text: str) -> None:
    """Print the text, or have it in the file at once: whoever reads the file sees the old text or the new one."""
    if path is None:
        sys.stdout.write(text)
        return
    from tapfs.errors import from_os_error

    new = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(new, path)
    except OSError as error:
        raise from_os_error(error, path=path, op="write the metrics") from error
    finally:
        if os.path.lexists(new):
            os.unlink(new)


def _listen(arguments: argparse.Namespace) -> int:
    from tapfs.cli.measuring import measured
    from tapfs.cli.metrics_server import serve
    from tapfs.nbd.sockets import Address, tcp_address

    try:
        address = (
            Address(os.path.abspath(arguments.listen)) if "/" in arguments.listen else tcp_address(arguments.listen)
        )
    except ValueError as error:
        raise UsageError(f"argument --listen: {error}", _PROGRAM) from None
    if address.path is None and not arguments.listen.rpartition(":")[2].isdecimal():
        raise UsageError("argument --listen: say HOST:PORT, or a path with a slash", _PROGRAM)

    def ready(place: str) -> None:
        print_line(place)
        sys.stdout.flush()

    serve(address, lambda: _exposition(measured(arguments)), ready)
    return 0


def _row(disk: Measured) -> tuple[str, ...]:
    counted = (disk.counted(name) for name in _COUNTERS.values())
    return (*disk.place, *("-" if value is None else str(value) for value in counted))
