"""The words that completions know: commands, formats, and the keys and values of `-o`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tapfs.cli.manual.described import Command, Kind, command_groups
from tapfs.cli.manual.option_values import values_of
from tapfs.cli.mount_options import options_of_mounts
from tapfs.disk.probe import aliases_of, format_named, own_format_names
from tapfs.driver import AmendableFormat, CreatableFormat

if TYPE_CHECKING:
    from collections.abc import Mapping


class KnownWords(NamedTuple):
    """All of them."""

    commands: list[Command]
    formats: list[str]
    #: Those of which images can be made.
    new_formats: list[str]
    #: By the kind of the option and the format: its keys with their values; None: the key stands alone.
    keys: dict[tuple[Kind, str], dict[str, tuple[str, ...] | None]]
    #: By command: the options that say the format of what `-o` is about.
    format_options: dict[str, tuple[str, ...]]


#: The last of these that a command has names the format of its new image.
_FORMAT_OPTIONS = ("--format", "--target-format", "--output-format")


def known_words() -> KnownWords:
    """The words of this tapfs, without the formats of other packages."""
    commands = [command for _, group in command_groups() for command in group]
    keys: dict[tuple[Kind, str], dict[str, tuple[str, ...] | None]] = {}
    formats, new_formats = list[str](), list[str]()
    for name in own_format_names():
        found = format_named(name)
        options: dict[Kind, Mapping[str, str]] = {
            Kind.CREATE_OPTIONS: found.create_options if isinstance(found, CreatableFormat) else {},
            Kind.AMEND_OPTIONS: found.amend_options if isinstance(found, AmendableFormat) else {},
        }
        for each in (name, *aliases_of(name)):
            formats.append(each)
            new_formats += [each] if isinstance(found, CreatableFormat) else []
            for kind, said in options.items():
                if said:
                    keys[kind, each] = {key: values_of(line) for key, line in said.items()}
    keys[Kind.MOUNT_OPTIONS, ""] = {
        key: () if takes_value else None for key, takes_value in options_of_mounts().items()
    }
    format_options = {command.name: _format_option(command) for command in commands}
    return KnownWords(commands, formats, new_formats, keys, format_options)


def _format_option(command: Command) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    for wanted in _FORMAT_OPTIONS:
        found = next((word.options for word in command.options if wanted in word.options), found)
    return found
