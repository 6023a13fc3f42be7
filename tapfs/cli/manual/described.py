"""The commands as their parsers describe them: options, words, and the kind of value that each takes."""

from __future__ import annotations

import argparse
from enum import StrEnum
from importlib import import_module
from typing import NamedTuple, cast

from tapfs.cli.main import GROUPS
from tapfs.cli.parser import CommandParsers, Parser
from tapfs.cli.sandboxed import add_sandbox_option


class Kind(StrEnum):
    """The kinds of values that a shell can complete."""

    FILE = "file"
    FOLDER = "folder"
    FORMAT = "format"
    #: A format of which images can be made.
    NEW_FORMAT = "new-format"
    CHOICE = "choice"
    #: The `-o` options of a format: of a new image, and of one that is amended.
    CREATE_OPTIONS = "create-options"
    AMEND_OPTIONS = "amend-options"
    MOUNT_OPTIONS = "mount-options"
    SNAPSHOT = "snapshot"
    #: A directory that an image is mounted on, or a RAM disk.
    MOUNTED = "mounted"
    RAM_DISK = "ram-disk"
    #: `if=FILE` and the like.
    OPERANDS = "operands"
    OTHER = "other"


class Word(NamedTuple):
    """An option, or a word that is none, as `options` is empty then."""

    options: tuple[str, ...]
    #: What stands for its value in a text; empty: it takes none.
    value: str
    #: The value may be left out, the word may be given again.
    optional: bool
    again: bool
    help: str
    kind: Kind
    choices: tuple[str, ...]


class Command(NamedTuple):
    """A command: its words by the titles of their groups, those that are no options first."""

    name: str
    summary: str
    description: str
    #: Written by hand where the parser has one.
    usage: str
    groups: tuple[tuple[str, tuple[Word, ...]], ...]

    @property
    def options(self) -> list[Word]:
        """Its options, of every group."""
        return [word for _, words in self.groups for word in words if word.options]

    @property
    def operands(self) -> list[Word]:
        """Its words that are no options."""
        return [word for _, words in self.groups for word in words if not word.options]


#: Kinds by what stands for a value in the help.
_KINDS = {
    "FMT": Kind.FORMAT,
    "FORMAT": Kind.FORMAT,
    "DIR": Kind.FOLDER,
    "ROOT": Kind.FOLDER,
    "SNAPSHOT": Kind.SNAPSHOT,
    "OPTIONS": Kind.MOUNT_OPTIONS,
    "ram:NAME": Kind.RAM_DISK,
    "WORD=VALUE": Kind.OPERANDS,
    "TAP": Kind.OTHER,
}
_FILES = {"FILE", "[IMAGE=]FILE", "IMAGE", "A", "B", "OLD", "NEW", "BASE", "DIFF", "SOURCE", "SOURCE ... TARGET"} | {
    *("TARGET", "PATH", "PARENT", "BACKING", "SPEC", "DEV", "COMMAND", "DEST", "SRC"),
}
#: Options that say the format of a new image; `create` has another.
_OF_NEW_IMAGES = {"--target-format", "--output-format"}
#: Options whose NAME is that of a snapshot which the image has.
_OF_SNAPSHOTS = {"--snapshot", "--second-snapshot", "--apply", "--delete"}
_REPEATED = (argparse._AppendAction,)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  argparse tells it by no other name


def command_groups() -> list[tuple[str, list[Command]]]:
    """Every command of `tapfs`, in the groups of `tapfs --help`."""
    parsers = CommandParsers()
    groups: list[tuple[str, list[Command]]] = []
    for title, (package, names) in GROUPS.items():
        for name in names:
            import_module(f"{package}.{name}").add_parser(parsers)
            add_sandbox_option(name, parsers.parsers[name])
        groups.append((title, [described(parsers.parsers[name], name, parsers.summaries[name]) for name in names]))
    return groups


def described(parser: Parser, name: str, summary: str) -> Command:
    """A command by its parser."""
    groups: list[tuple[str, tuple[Word, ...]]] = []
    for group in parser._action_groups:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  as above
        actions = group._group_actions  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        words = tuple(_word(name, action) for action in actions if action.help != argparse.SUPPRESS)
        if words:
            groups.append((group.title or "options", words))
    return Command(name, summary, parser.description or "", parser.usage or "", tuple(groups))


def _word(command: str, action: argparse.Action) -> Word:
    choices = tuple(str(each) for each in cast("tuple[object, ...]", tuple(action.choices or ())))
    value = "" if action.nargs == 0 else str(action.metavar or "|".join(choices) or action.dest.upper())
    return Word(
        options=tuple(action.option_strings),
        value=value,
        optional=action.nargs in ("?", "*"),
        again=action.nargs == "*" or isinstance(action, _REPEATED),
        help=_help_of(action),
        kind=_kind(command, action, value, choices),
        choices=choices,
    )


def _help_of(action: argparse.Action) -> str:
    text = action.help or ""
    return text % {"default": action.default, "prog": "tapfs"} if "%" in text else text


def _kind(command: str, action: argparse.Action, value: str, choices: tuple[str, ...]) -> Kind:
    if choices:
        return Kind.CHOICE
    if value == "KEY=VALUE,...":
        return Kind.AMEND_OPTIONS if command == "amend" else Kind.CREATE_OPTIONS
    if value == "NAME" and _OF_SNAPSHOTS.intersection(action.option_strings):
        return Kind.SNAPSHOT
    if command == "umount" and not action.option_strings:
        return Kind.MOUNTED
    if value in _FILES:
        return Kind.FILE
    if {*_OF_NEW_IMAGES, *(["--format"] if command == "create" else [])}.intersection(action.option_strings):
        return Kind.NEW_FORMAT
    return _KINDS.get(value, Kind.OTHER)
