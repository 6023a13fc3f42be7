"""Each command has a sandbox, or stands among those without one with what takes its place."""

from __future__ import annotations

from tapfs.cli import main
from tapfs.cli.parser import CommandParsers
from tapfs.cli.sandboxed import EXEMPT, SANDBOXED, SERVERS


def test_each_command_has_a_sandbox_or_a_reason() -> None:
    decided = [*SANDBOXED, *SERVERS, *EXEMPT]
    assert sorted(decided) == sorted(main.COMMANDS), "tapfs/cli/sandboxed.py: a command is in one of three tables"
    assert all(len(reason.split()) > 2 for reason in EXEMPT.values())


def test_who_has_no_sandbox_takes_no_option_for_it() -> None:
    for name in main.COMMANDS:
        parsers = CommandParsers()
        main.import_module(main.COMMANDS[name]).add_parser(parsers)
        main.add_sandbox_option(name, parsers.parsers[name])
        said = "--no-sandbox" in parsers.parsers[name].format_help()
        assert said == (name in (*SANDBOXED, *SERVERS, "survey")), name
