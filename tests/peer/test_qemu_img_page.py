"""docs/qemu-img.md says of both programs what is so: options by help and parser, exit codes by running them."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tapfs.cli.main import COMMANDS
from tapfs.cli.parser import CommandParsers
from tests.peer.newest_qemu import newest_qemu

Run = Callable[..., Any]
PAGE = Path(__file__).parents[2] / "docs/qemu-img.md"
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
OPERANDS = {"dd": {"if=", "of=", "bs=", "count=", "skip=", "isize=", "osize="}}
#: Of QEMU 10.0: a spelling that is wrong in the help and right in the program.
MISPRINTS = {"--progres"}
#: Options that take a value there, of which that help does not say so.
VALUE_LEFT_OUT = {("measure", "-f"), ("measure", "--format")}
EXIT_CODES = "Exit codes"


class Row(NamedTuple):
    """A row of a table: qemu-img's spellings, what the second column says, and the remark."""

    theirs: list[str]
    ours: str
    remark: str

    @property
    def spellings(self) -> list[str]:
        """The options that the second column names."""
        return self.theirs if self.ours == "same" else re.findall(r"`([^`]+)`", self.ours)


@cache
def page() -> dict[str, list[list[str]]]:
    """The cells of the tables, by the title of the chapter."""
    found: dict[str, list[list[str]]] = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        found[part.splitlines()[0]] = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    return found


def rows(command: str) -> list[Row]:
    return [Row(re.findall(r"`([^`]+)`", theirs), ours, remark) for theirs, ours, remark in page()[command]]


@cache
def options_of(command: str) -> dict[str, argparse.Action]:
    parsers = CommandParsers()
    import_module(COMMANDS[command]).add_parser(parsers)
    actions = parsers.parsers[command]._actions
    return {option: action for action in actions for option in action.option_strings}


def helped(program: str, *words: str) -> str:
    return subprocess.run([program, *words, "--help"], capture_output=True, text=True, check=False).stdout


def old_options() -> dict[str, set[str]]:
    """The options of each command, by the help of QEMU 7.2."""
    lines = re.findall(r"^  ([a-z]+) (.*filename.*|.*if=input.*)$", helped("qemu-img"), flags=re.MULTILINE)
    return {
        command: set(OPTION.findall(line)) | {word for word in OPERANDS.get(command, ()) if f"{word}" in line}
        for command, line in lines
    }


def new_options(command: str) -> dict[str, bool]:
    """The options of a command by the help of QEMU 10, and whether each takes a value."""
    found: dict[str, bool] = {}
    for line in helped(newest_qemu("qemu-img"), command).splitlines():
        match = re.match(r"\s{1,7}((?:-[A-Za-z]|--[a-z][\w-]*)(?:,\s*--?[\w-]+)*)( *[A-Za-z\[].*)?$", line)
        if match:
            found |= dict.fromkeys(OPTION.findall(match[1]), match[2] is not None)
        operand = re.match(r"\s{1,3}([a-z]+=)", line)
        if operand:
            found[operand[1]] = True
    return {option: valued for option, valued in found.items() if option not in {"-h", "--help", *MISPRINTS}}


def test_every_subcommand_and_every_option_of_qemu_img_is_on_the_page_and_no_other() -> None:
    old = old_options()
    commands = re.findall(r"^  ([a-z]+) - ", helped(newest_qemu("qemu-img")), flags=re.MULTILINE)
    assert len(commands) > 10
    assert set(page()) == {*commands, *old, EXIT_CODES}
    for command in commands:
        there = old[command] | set(new_options(command))
        told = {option for row in rows(command) for option in row.theirs}
        assert there <= told, command
        for row in rows(command):
            assert "QEMU 11" in row.remark or "Proxmox" in row.remark or set(row.theirs) <= there, (command, row)


def test_what_the_page_says_of_tapfs_is_what_its_parser_says() -> None:
    for command in page().keys() - {EXIT_CODES}:
        mine = options_of(command) if command in COMMANDS else {}
        words = OPERANDS.get(command, set())
        for row in rows(command):
            there = [option for option in row.theirs if option in mine or option in words]
            if row.ours == "not there":
                assert not [option for option in there if option != "--cache"], (command, row)
            elif row.ours == "refused":
                assert there
                assert (mine[there[0]].help or "").startswith("refused: "), (command, row)
            else:
                assert row.spellings, (command, row)
                assert all(option in mine or option in words for option in row.spellings), (command, row)
                assert not any((mine[o].help or "").startswith("refused: ") for o in row.spellings if o in mine)


def test_options_that_are_the_same_take_a_value_or_none_as_there() -> None:
    for command in page().keys() - {EXIT_CODES, "bench"}:
        valued, mine = new_options(command), options_of(command)
        for row in rows(command):
            for option in row.spellings:
                if option in mine and option in valued and option in row.theirs:
                    takes_value = valued[option] or (command, option) in VALUE_LEFT_OUT
                    assert (mine[option].nargs != 0) == takes_value, (command, option)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images: a clean one, one that differs, one that leaks, one that is corrupt, and a raw one."""
    for name in ("clean", "other", "leaks", "corrupt"):
        command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {3 if name == 'other' else 2} 0 64k"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / name, "1M"], check=True)
        subprocess.run([*command, tmp_path / name], check=True, capture_output=True)
    content = bytearray((tmp_path / "leaks").read_bytes())
    block = int.from_bytes(content[65536:65544], "big")
    (tmp_path / "leaks").write_bytes(content[: block + 20] + b"\0\1" + content[block + 22 :] + bytes(65536 * 6))
    (tmp_path / "corrupt").write_bytes(content[: block + 10] + b"\0\0" + content[block + 12 :])
    (tmp_path / "raw").write_bytes(bytes(65536))
    return tmp_path


CASES: dict[str, tuple[str, ...]] = {
    "done": ("info", "clean"),
    "compare: the disks are the same": ("compare", "clean", "clean"),
    "compare: they differ": ("compare", "clean", "other"),
    "compare: an image cannot be opened": ("compare", "clean", "missing"),
    "check: no errors": ("check", "clean"),
    "check: corrupt": ("check", "corrupt"),
    "check: leaks only": ("check", "leaks"),
    "check: the format has nothing to check": ("check", "-f", "raw", "raw"),
    "check: no such file": ("check", "missing"),
    "convert: no such file": ("convert", "missing", "target"),
    "an option that is not there": ("info", "--nonsense", "clean"),
}


@pytest.mark.usefixtures("each_qemu")
def test_the_exit_codes_are_as_told(tapfs: Run, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    told = {case: (int(theirs), int(ours)) for case, theirs, ours in page()[EXIT_CODES]}
    assert set(told) == set(CASES)
    for case, words in CASES.items():
        theirs = subprocess.run(["qemu-img", *words], capture_output=True, check=False).returncode
        assert (theirs, tapfs(*words).code) == told[case], case
