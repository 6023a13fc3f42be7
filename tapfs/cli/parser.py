"""The argument parser of every command: usage errors are one line, and `--` ends the options.

argparse's own `parse_intermixed_args` loses `--` on some versions of Python: a file name after it became an
option. So :meth:`Parser.parse` separates options from file names itself, and argparse sees options only.
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, Protocol

from tapfs.cli.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from _typeshed import SupportsWrite

# argparse would load `locale` to look for translations of its words, of which there are none.
setattr(argparse, "_", str)  # noqa: B010  it is no public name

#: A word that begins with '-' and one of these is no option: `--nice -5`, `resize FILE -1G`. No option is a digit.
_DIGITS = tuple("0123456789")


class Subparsers(Protocol):
    """Where a command puts its parser."""

    def add_parser(self, name: str, *, help: str, description: str) -> Parser:  # noqa: A002 - argparse's word
        """Add the parser of the command `name`; `help` is its line in the list of commands."""
        ...


class UsageError(Exception):
    """The command line cannot be obeyed as it stands; `program` is the command whose help explains it."""

    def __init__(self, message: str, program: str) -> None:
        super().__init__(message)
        self.program = program


class Parser(argparse.ArgumentParser):
    """A parser that raises :class:`UsageError` and takes no abbreviated options: scripts outlive them."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _help_formatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  argparse takes any of these

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """What the words say. Options may stand anywhere before the first `--`; what follows it are no options.

        Raises UsageError.
        """
        options, names = self._separate(words)
        positionals = self._get_positional_actions()
        for action in positionals:
            action.required = False  # argparse gets none of them
        arguments = self.parse_args(options)
        self._take(positionals, names, arguments)
        return arguments

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help; argparse itself would say nothing of a full disk behind standard output."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the whole usage."""
        raise UsageError(message, self.prog)

    def _separate(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """The options, each with its value as `OPTION=VALUE`, and the other words."""
        options: list[str] = []
        names: list[str] = []
        rest = list(reversed(words))
        while rest:
            word = rest.pop()
            if word == "--":
                names += reversed(rest)
                break
            if _is_no_option(word):
                names.append(word)
                continue
            flags, option, value = self._split(word)
            options += flags
            if option is None:
                continue
            if value is None and rest and _is_no_option(rest[-1]):
                value = rest.pop()
            elif value is None and self._option_string_actions[option].nargs is None:
                self.error(f"{option} needs a value (one that begins with '-' is written {option}=VALUE)")
            options.append(option if value is None else f"{option}={value}")
        return options, names

    def _split(self, word: str) -> tuple[list[str], str | None, str | None]:
        """The flags in a word, the option in it that takes a value, and the value if it is in the word, too."""
        name, equals, value = word.partition("=")
        if word in self._option_string_actions:
            return ([], word, None) if self._takes_value(word) else ([word], None, None)
        if equals and name in self._option_string_actions:
            if not self._takes_value(name):
                self.error(f"{name} takes no value")
            return [], name, value
        if word.startswith("--"):
            self._unknown(name)
        flags: list[str] = []
        for place, letter in enumerate(word[1:], start=1):
            option = f"-{letter}"
            if option not in self._option_string_actions:
                self._unknown(word if place == 1 else option)
            if self._takes_value(option):
                return flags, option, word[place + 1 :] or None
            flags.append(option)
        return flags, None, None

    def _takes_value(self, option: str) -> bool:
        return self._option_string_actions[option].nargs != 0

    def _unknown(self, option: str) -> NoReturn:
        self.error(f"no such option: {option}{did_you_mean(option, self._option_string_actions)}")

    def _take(self, positionals: list[argparse.Action], names: list[str], arguments: argparse.Namespace) -> None:
        """Give the words that are no options to the positionals, from left to right."""
        needed = [_name_of(action) for action in positionals if action.nargs is None]
        if missing := needed[len(names) :]:
            self.error(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        spare = len(names) - len(needed)
        rest = list(reversed(names))
        for action in positionals:
            count = {None: 1, "?": min(1, spare), "*": spare}[action.nargs]  # type: ignore[index]  # pyright: ignore[reportArgumentType]  commands have no others
            spare -= count if action.nargs is not None else 0
            values = [self._converted(action, rest.pop()) for _ in range(count)]
            if action.nargs == "*":
                setattr(arguments, action.dest, values)
            elif values:
                setattr(arguments, action.dest, values[0])
        if rest:
            self.error(f"one word too many: {rest[-1]!r}")

    def _converted(self, action: argparse.Action, word: str) -> object:
        if not callable(action.type):
            return word
        try:
            return action.type(word)
        except argparse.ArgumentTypeError as error:
            self.error(f"argument {_name_of(action)}: {error}")


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    """What argparse makes for each argument. Its own search for the width loads `shutil`, which takes 3 ms."""
    said = os.environ.get("COLUMNS", "")
    columns = int(said) if said.isdecimal() else 0
    if not columns:
        with suppress(OSError):
            columns = os.get_terminal_size(1).columns
    return argparse.RawDescriptionHelpFormatter(prog, width=(columns or 80) - 2)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to put behind a message about an unknown word: the known word that is most like it, if one is."""
    from difflib import get_close_matches  # only mistakes pay for it

    found = get_close_matches(word, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _is_no_option(word: str) -> bool:
    return word == "-" or not word.startswith("-") or word[1:2] in _DIGITS


def _name_of(action: argparse.Action) -> str:
    return str(action.metavar or action.dest)


class CommandParsers:
    """The parsers that commands have added, by name."""

    def __init__(self) -> None:
        self.parsers: dict[str, Parser] = {}
        self.summaries: dict[str, str] = {}

    def add_parser(self, name: str, *, help: str, description: str) -> Parser:  # noqa: A002 - argparse's word
        """Add the parser of the command `name`; `help` is its line in the list of commands."""
        self.parsers[name] = Parser(prog=f"tapfs {name}", description=description)
        self.summaries[name] = help
        return self.parsers[name]


def format_argument(text: str) -> str:
    """The name of a format for argparse: QCOW is qcow, as in qemu-img."""
    return text.lower()


def size_argument(text: str) -> int:
    """A size for argparse."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_rate_option(parser: argparse.ArgumentParser, does: str) -> None:
    """Add -r, a bound of what is read or written in a second, because guests need the host, too; `does` says which."""
    told = f"{does} at most so many bytes a second (10M; 0: no limit)"
    parser.add_argument("-r", "--rate-limit", metavar="RATE", type=size_argument, help=told)


def parse_options(pairs: list[str], program: str) -> dict[str, str]:
    """The `-o key=value,key=value` pairs; a key alone means `on`. Raises UsageError."""
    options: dict[str, str] = {}
    for pair in (piece for text in pairs for piece in text.split(",")):
        key, equals, value = pair.partition("=")
        if not key:
            raise UsageError(f"not an option: {pair!r} (-o takes key=value,key=value)", program)
        options[key] = value if equals else "on"
    return options
