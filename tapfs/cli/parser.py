"""The argument parser: usage errors are one line, and what they exit with is decided in one place."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn, Protocol

from tapfs.cli.sizes import parse_size

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


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
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  argparse takes any of these

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help; argparse itself would say nothing of a full disk behind standard output."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the whole usage."""
        raise UsageError(message, self.prog)


class CommandParsers:
    """The parsers that commands have added. Each parses on its own, which argparse's subparsers cannot intermixed."""

    def __init__(self) -> None:
        self.parsers: dict[str, Parser] = {}
        self.summaries: dict[str, str] = {}

    def add_parser(self, name: str, *, help: str, description: str) -> Parser:  # noqa: A002 - argparse's word
        """Add the parser of the command `name`; `help` is its line in the list of commands."""
        self.parsers[name] = Parser(prog=f"tapfs {name}", description=description)
        self.summaries[name] = help
        return self.parsers[name]


def size_argument(text: str) -> int:
    """A size for argparse."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_options(pairs: list[str], program: str) -> dict[str, str]:
    """The `-o key=value,key=value` pairs; a key alone means `on`. Raises UsageError."""
    options: dict[str, str] = {}
    for pair in (piece for text in pairs for piece in text.split(",")):
        key, equals, value = pair.partition("=")
        if not key:
            raise UsageError(f"not an option: {pair!r} (-o takes key=value,key=value)", program)
        options[key] = value if equals else "on"
    return options
