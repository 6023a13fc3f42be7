"""The command line's words: options anywhere before `--`, file names only after it, on every Python."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tapfs.cli import main
from tapfs.cli.parser import CommandParsers, Parser, UsageError, size_argument
from tapfs.errors import EXIT_USAGE

Run = Callable[..., Any]


@pytest.fixture
def parser() -> Parser:
    """Every kind of word that a command has."""
    parser = Parser(prog="p")
    parser.add_argument("first")
    parser.add_argument("second", nargs="?", type=size_argument)
    parser.add_argument("-f", "--format")
    parser.add_argument("-n", "--number", type=int)
    parser.add_argument("-o", dest="options", action="append", default=[])
    parser.add_argument("-q", action="store_true")
    parser.add_argument("--install", nargs="?", const="/")
    group = parser.add_argument_group("more").add_mutually_exclusive_group()
    group.add_argument("-v", "--verbose", action="store_true")
    group.add_argument("--force", action="store_true")
    return parser


PLAIN: dict[str, object] = {
    "first": None,
    "second": None,
    "format": None,
    "number": None,
    "options": [],
    "q": False,
    "install": None,
    "verbose": False,
    "force": False,
}


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (["a"], {"first": "a"}),
        (["a", "1K"], {"first": "a", "second": 1024}),
        (["-"], {"first": "-"}),
        ([""], {"first": ""}),
        (["--", "--force"], {"first": "--force"}),
        (["--", "--force", "1K"], {"first": "--force", "second": 1024}),
        (["a", "--", "1K"], {"first": "a", "second": 1024}),
        (["-q", "--", "--"], {"first": "--", "q": True}),
        (["--", "-f"], {"first": "-f"}),
        (["--", "-x y"], {"first": "-x y"}),
        (["a", "-qfraw"], {"first": "a", "q": True, "format": "raw"}),
        (["a", "-q", "-f", "raw", "2"], {"first": "a", "q": True, "format": "raw", "second": 2}),
        (["--format=-raw", "a"], {"first": "a", "format": "-raw"}),
        (["-f=-raw", "a"], {"first": "a", "format": "-raw"}),
        (["-f", "", "a"], {"first": "a", "format": ""}),
        (["-fa b", "a"], {"first": "a", "format": "a b"}),
        (["-f", "a=b", "a"], {"first": "a", "format": "a=b"}),
        (["-f", "-", "a"], {"first": "a", "format": "-"}),
        (["-n", "-5", "a"], {"first": "a", "number": -5}),
        (["-o", "x", "a", "-ox=y", "-o", "help"], {"first": "a", "options": ["x", "x=y", "help"]}),
        (["a", "--install"], {"first": "a", "install": "/"}),
        (["--install", "--", "a"], {"first": "a", "install": "/"}),
        (["--install", "r", "a"], {"first": "a", "install": "r"}),
        (["a", "--force"], {"first": "a", "force": True}),
    ],
    ids=repr,
)
def test_words(parser: Parser, words: Sequence[str], meaning: dict[str, object]) -> None:
    assert vars(parser.parse(words)) == PLAIN | meaning


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "first is missing"),
        (["--"], "first is missing"),
        (["-q"], "first is missing"),
        (["a", "1", "b"], "one word too many: 'b'"),
        (["a", "--", "1", "--q"], "one word too many: '--q'"),
        (["a", "b"], "argument second: not a size: 'b' .*"),
        (["a", "-f"], "-f needs a value .*"),
        (["a", "-f", "--"], "-f needs a value .*"),
        (["a", "-f", "-q"], "-f needs a value .*"),
        (["a", "--force=yes"], "--force takes no value"),
        (["a", "--for"], "no such option: --for; did you mean --force.*"),
        (["a", "--fromat=raw"], "no such option: --fromat; did you mean --format.*"),
        (["a", "-x"], "no such option: -x"),
        (["a", "-qx"], "no such option: -x"),
        (["a", "-5"], "argument second: not a size: '-5'.*"),
        (["a", "-x y"], "no such option: -x y"),
        (["a", "-n", "x"], "argument -n/--number: invalid int value: 'x'"),
        (["a", "-v", "--force"], ".*not allowed with.*"),
    ],
    ids=repr,
)
def test_wrong_words(parser: Parser, words: Sequence[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parser.parse(words)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


def test_any_number_of_words() -> None:
    parser = Parser(prog="p")
    parser.add_argument("first")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("-q", action="store_true")
    assert parser.parse(["a"]).rest == []
    assert parser.parse(["a", "b", "-q", "c", "--", "-q", "--"]).rest == ["b", "c", "-q", "--"]


@pytest.mark.parametrize("command", main.COMMANDS)
def test_only_kinds_that_the_parser_knows(command: str) -> None:
    """A kind of argument that `Parser.parse` would not give its words to must not slip in."""
    commands = CommandParsers()
    import_module(main.COMMANDS[command]).add_parser(commands)
    for action in commands.parsers[command]._actions:  # argparse has no public list
        known = (None, 0, "?") if action.option_strings else (None, "?", "*")
        assert action.nargs in known, action.dest
        assert action.option_strings or action.choices is None, action.dest
        assert not isinstance(action, argparse.BooleanOptionalAction)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_after_two_dashes_nothing_is_an_option(tapfs: Run, command: str) -> None:
    """Had `--help` been an option here, the command would have succeeded and explained itself."""
    code, out, _ = tapfs(command, "--", *["--help"] * 20)
    # Those that go through a list of names tell at the end what could not be had.
    named = {"umount": 17, "convert": 17, "measure": 17, "survey": 1}
    assert (code, out) == (EXIT_USAGE, "") or code == named.get(command)


def test_a_file_that_is_called_like_an_option(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tapfs create -- --force disk.raw 1M` once truncated disk.raw."""
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(b"precious")
    Path("--force").write_bytes(b"")
    assert tapfs("create", "-f", "raw", "--", "--force", "disk.raw", "1M").code == EXIT_USAGE
    assert Path("disk.raw").read_bytes() == b"precious"
    assert tapfs("create", "-f", "raw", "--", "--force", "1M") == (0, "", "")
    assert Path("--force").stat().st_size == 1 << 20
    assert tapfs("convert", "-f", "raw", "-O", "qcow", "--", "--force", "-x.qcow") == (0, "", "")
    for words in (("info", "--"), ("info", "--json", "--"), ("map", "--"), ("check", "--"), ("repair", "-n", "--")):
        assert tapfs(*words, "-x.qcow").code == 0, words
    assert tapfs("compare", "-F", "raw", "--", "-x.qcow", "--force").code == 0
