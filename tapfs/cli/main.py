"""`tapfs`: finds the command and loads its module only, for a cold `tapfs info` must be quick."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from tapfs.cli.guard import EXIT_BROKEN_PIPE, guarded
from tapfs.cli.parser import CommandParsers, Parser, UsageError
from tapfs.cli.signals import signals_held
from tapfs.errors import CODES, EXIT_BUG, EXIT_INTERRUPTED, EXIT_USAGE, ErrorKind

#: Command to module. Each module has `add_parser(subparsers)` and imports what is heavy in `run`.
COMMANDS: dict[str, str] = {
    "info": "tapfs.cli.commands.info",
    "map": "tapfs.cli.commands.map",
    "check": "tapfs.cli.commands.check",
    "repair": "tapfs.cli.commands.repair",
    "create": "tapfs.cli.commands.create",
    "convert": "tapfs.cli.commands.convert",
    "compare": "tapfs.cli.commands.compare",
    "mount": "tapfs.cli.commands.mount",
    "umount": "tapfs.cli.commands.umount",
    "list": "tapfs.cli.commands.list",
    "remove": "tapfs.cli.commands.remove",
    "attach": "tapfs.cli.guests.attach",
    "detach": "tapfs.cli.guests.detach",
    "stats": "tapfs.cli.guests.stats",
    "pause": "tapfs.cli.guests.pause",
    "resume": "tapfs.cli.guests.resume",
    "swap": "tapfs.cli.guests.swap",
    "resize": "tapfs.cli.guests.resize",
    "limit": "tapfs.cli.guests.limit",
    "blktapctrl": "tapfs.cli.guests.blktapctrl",
}

_MEANINGS: dict[ErrorKind, str] = {
    ErrorKind.CORRUPT: "the image is corrupt",
    ErrorKind.IO: "the host could not read or write",
    ErrorKind.INVALID_FORMAT: "not an image of that format",
    ErrorKind.UNSUPPORTED: "a feature that tapfs does not have",
    ErrorKind.OUT_OF_BOUNDS: "an offset or size outside what is possible",
    ErrorKind.NO_SPACE: "no space left (disk, quota or file size limit)",
    ErrorKind.LOCKED: "in use by another process",
    ErrorKind.READ_ONLY: "read-only",
    ErrorKind.NOT_FOUND: "no such file or directory",
    ErrorKind.EXISTS: "exists already",
    ErrorKind.DENIED: "permission or password missing",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; the table is at the end of `tapfs --help`."""
    words = sys.argv[1:] if argv is None else argv
    return guarded("tapfs", lambda: _dispatch(words), ends_process=argv is None)


def exit_code_table() -> str:
    """The exit codes, one a line, from the table in tapfs/errors.py."""
    rows = [
        (0, "done; check: clean; compare: same"),
        (1, "compare: different"),
        (3, "check: leaked space, no corruption"),
        (EXIT_USAGE, "the command line is wrong"),
        (EXIT_BUG, "a bug in tapfs"),
        (EXIT_INTERRUPTED, "interrupted (Ctrl-C); 143 and 129: SIGTERM and SIGHUP"),
        (EXIT_BROKEN_PIPE, "the reader of standard output went away"),
    ]
    rows += [(codes.exit_code, _MEANINGS[kind]) for kind, codes in CODES.items()]
    return "exit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in sorted(rows))


def _dispatch(words: list[str]) -> int:
    wanted = words[0] if words else ""
    if wanted in COMMANDS:
        return run_command(wanted, words[1:])
    parser = Parser(
        prog="tapfs",
        usage="tapfs COMMAND ...",
        description="Disk images served from userspace. 'tapfs COMMAND --help' explains a command.\n"
        "An image is a file, a block device, or ram:NAME for a disk in shared memory.",
    )
    if wanted in ("-h", "--help"):
        parser.epilog = f"{_command_list()}\n\n{exit_code_table()}"
    elif not wanted.startswith("-"):
        words = []
    parser.add_argument("--version", action=_Version)
    parser.parse(words)
    problem = f"no such command: {wanted!r}" if wanted else "a command is missing"
    raise UsageError(f"{problem} (there are {', '.join(COMMANDS)})", "tapfs")


def run_command(name: str, words: list[str]) -> int:
    """Run the command `name` with the words after it; errors are the caller's. Returns its exit code."""
    with signals_held():
        commands = CommandParsers()
        import_module(COMMANDS[name]).add_parser(commands)
        arguments = commands.parsers[name].parse(words)
    code: int = arguments.run(arguments)
    return code


def _command_list() -> str:
    commands = CommandParsers()
    for module in COMMANDS.values():
        import_module(module).add_parser(commands)
    return "commands:\n" + "\n".join(f"  {name:<10} {text}" for name, text in commands.summaries.items())


class _Version(argparse.Action):
    """Print the version; where it stands is only looked up on request."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"tapfs {version('tapfs')}")
        parser.exit()
