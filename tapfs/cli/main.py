"""`tapfs`: find the command and load only its module, because a cold `tapfs info` must be quick."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from tapfs.cli.guard import EXIT_BROKEN_PIPE, guarded
from tapfs.cli.json_output import wants_json
from tapfs.cli.parser import CommandParsers, Parser, UsageError, did_you_mean
from tapfs.cli.sandboxed import add_sandbox_option, enter_for
from tapfs.errors import CODES, EXIT_BUG, EXIT_INTERRUPTED, EXIT_NOT_CHECKED, ErrorKind
from tapfs.serving.signals import signals_held

#: The commands as `tapfs --help` groups them, with the package of their modules. A module is named as its command,
#: has `add_parser(subparsers)`, and imports what is heavy in `run`.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "images": (
        "tapfs.cli.commands",
        (
            *("info", "survey", "map", "report", "check", "compare", "diff", "changes", "create", "convert", "dd"),
            *("measure", "apply", "commit", "rebase", "compact", "repair", "resize", "amend", "snapshot", "bitmap"),
            "formats",
            *("hash", "verify", "scrub", "salvage"),
        ),
    ),
    "mounts and RAM disks": ("tapfs.cli.commands", ("mount", "umount", "serve", "provide", "list", "remove")),
    "disks of Xen guests, block devices": (
        "tapfs.cli.guests",
        ("attach", "detach", "stats", "pause", "resume", "swap", "mirror", "limit", "blktapctrl"),
    ),
}

#: Command to module.
COMMANDS: dict[str, str] = {name: f"{package}.{name}" for package, names in GROUPS.values() for name in names}

_MEANINGS: dict[ErrorKind, str] = {
    ErrorKind.INVALID_ARGUMENT: "the command line is wrong, or leaves a choice open",
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
    owned = argv is None
    if words and words[0] not in COMMANDS:
        from tapfs.cli.fuse_helper import is_call_of_mount_fuse, mount_for_mount_fuse

        if is_call_of_mount_fuse(words):
            return mount_for_mount_fuse(words, owned=owned)
    return guarded("tapfs", lambda: _dispatch(words, owned=owned), ends_process=owned, json=wants_json(words))


def exit_code_table() -> str:
    """The exit codes, one a line, from the table in tapfs/errors.py."""
    rows = [
        (0, "done; check: clean; compare, verify: same"),
        (1, "compare: different; verify: changed since; salvage: a part is zeros or doubtful; survey: not all read"),
        (3, "check: leaked space, no corruption"),
        (EXIT_NOT_CHECKED, "check, repair: there is nothing that tapfs could check"),
        (EXIT_BUG, "a bug in tapfs"),
        (EXIT_INTERRUPTED, "interrupted (Ctrl-C); 143 and 129: SIGTERM and SIGHUP"),
        (EXIT_BROKEN_PIPE, "the reader of standard output went away"),
    ]
    rows += [(codes.exit_code, _MEANINGS[kind]) for kind, codes in CODES.items()]
    return "exit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in sorted(rows))


def _dispatch(words: list[str], *, owned: bool = False) -> int:
    wanted = words[0] if words else ""
    if wanted in COMMANDS:
        return run_command(wanted, words[1:], owned=owned)
    if wanted == "help":
        return _help(words[1:])
    parser = Parser(
        prog="tapfs",
        usage="tapfs COMMAND ...",
        description="Disk images served from userspace. 'tapfs help COMMAND' explains a command.\n"
        "An image is a file, a block device, an address such as https://HOST/FILE or nbd://HOST/EXPORT, or\n"
        "ram:NAME for a disk in shared memory (a file called so: ./ram:NAME).",
    )
    if wanted in ("-h", "--help"):
        parser.epilog = f"{_command_list()}\n\n{exit_code_table()}"
    elif not wanted.startswith("-"):
        words = []
    parser.add_argument("--version", action=_Version)
    parser.parse(words)
    if not wanted:
        raise UsageError("a command is missing", "tapfs")
    raise _no_such_command(wanted)


def run_command(name: str, words: list[str], *, owned: bool = False) -> int:
    """Run the command `name` with the words after it; errors are the caller's. Returns its exit code.

    `owned`: this process is the command's own, and can be put into a sandbox (`tapfs.cli.sandboxed`).
    """
    arguments = parsed_command(name, words)
    arguments.owned = owned
    if owned:
        enter_for(name, arguments)
    code: int = arguments.run(arguments)
    return code


def parsed_command(name: str, words: list[str]) -> argparse.Namespace:
    """What the words after the command `name` say; its `run` takes it. Raises UsageError."""
    with signals_held():
        commands = CommandParsers()
        import_module(COMMANDS[name]).add_parser(commands)
        add_sandbox_option(name, commands.parsers[name])
        arguments = commands.parsers[name].parse(words)
    arguments.command_words = words
    return arguments


def _help(words: list[str]) -> int:
    """`tapfs help [COMMAND]`: the same as `tapfs [COMMAND] --help`."""
    names = [word for word in words if not word.startswith("-")]
    if len(names) > 1:
        raise UsageError(f"one word too many: {names[1]!r}", "tapfs help")
    if names and names[0] not in COMMANDS and names[0] != "help":
        raise _no_such_command(names[0])
    return run_command(names[0], ["--help"]) if names and names[0] in COMMANDS else _dispatch(["--help"])


def _no_such_command(name: str) -> UsageError:
    guess = did_you_mean(name, [*COMMANDS, "help"])
    return UsageError(f"no such command: {name!r}{guess}", "tapfs")


def _command_list() -> str:
    commands = CommandParsers()
    lines: list[str] = []
    for title, (_, names) in GROUPS.items():
        lines.append(f"{title}:")
        for name in names:
            import_module(COMMANDS[name]).add_parser(commands)
            lines.append(f"  {name:<10} {commands.summaries[name]}")
        lines.append("")
    return "\n".join(lines[:-1])


class _Version(argparse.Action):
    """Print the version; where it stands is only looked up on request."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"tapfs {version('tapfs')}")
        parser.exit()
