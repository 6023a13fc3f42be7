"""The manual pages: groff and mandoc have nothing to say against them, and they have what the parsers have."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tapfs.cli.main import COMMANDS
from tapfs.cli.manual.__main__ import write_all
from tapfs.cli.manual.described import command_groups
from tapfs.cli.manual.roff import escaped, prose
from tapfs.disk.probe import own_format_names
from tests.conftest import REPOSITORY, Ran

_TEXT = {"LC_ALL": "C.UTF-8", "MANWIDTH": "80", "PATH": os.environ["PATH"], "MAN_KEEP_FORMATTING": ""}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("manual")
    write_all(folder, version="1.2.3")
    return {path.name: path for path in (folder / "man").rglob("*.*")}


def shown(page: Path) -> str:
    """A page as a reader sees it, without the breaks of its lines."""
    done = subprocess.run(["man", "-l", str(page)], env=_TEXT, capture_output=True, text=True, check=True)
    return " ".join(re.sub(r".\x08", "", done.stdout).split())


def test_there_is_a_page_for_each_command_and_program(pages: dict[str, Path]) -> None:
    programs = {"qcow-create.1", "img2qcow.1", "qcow2raw.1", "mount.fuse.tapfs.8", "mount.tapfs.8"}
    assert set(pages) == {f"tapfs-{name}.1" for name in COMMANDS} | programs | {"tapfs.1", "tapfs-formats.5"}


def test_no_page_has_an_error_in_it(pages: dict[str, Path]) -> None:
    names = [str(path) for path in pages.values()]
    lint = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", *names], capture_output=True, text=True, check=False
    )
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")
    # One call of groff for all: `man --warnings` is a call of it, too, and costs a second a page.
    groff = ["groff", "-man", "-Tutf8", "-ww", "-rLL=80n", *names]
    assert subprocess.run(groff, capture_output=True, text=True, check=True).stderr == ""


def test_man_shows_a_page_without_a_warning(pages: dict[str, Path]) -> None:
    done = subprocess.run(
        ["man", "--warnings", "-l", str(pages["tapfs-formats.5"])],
        env=_TEXT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_a_page_says_what_the_help_says(pages: dict[str, Path], tapfs: Callable[..., Ran]) -> None:
    page = shown(pages["tapfs-convert.1"])
    help_text = " ".join(tapfs("convert", "--help").out.split())
    options = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", help_text.partition("options:")[2]))
    assert len(options) > 30
    assert {option for option in options if option not in page} == set()
    assert "tapfs 1.2.3" in page


def test_the_page_of_formats_has_every_format(pages: dict[str, Path]) -> None:
    page = shown(pages["tapfs-formats.5"])
    assert [name for name in own_format_names() if f" {name} " not in page] == []
    assert "Also called vpc." in page
    assert "compression_type=VALUE zlib (default) or zstd" in page


def test_text_never_is_a_request() -> None:
    assert escaped(".SH x\\y 'a' -b …") == "\\&.SH x\\ey \\(aqa\\(aq \\-b \\[u2026]"
    assert prose("one\n\n  two\n.three") == "one\n.PP\n.RS 4\n.nf\ntwo\n.fi\n.RE\n\\&.three\n"


def test_the_date_is_that_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    write_all(tmp_path, version="0")
    assert '"1970-01-02"' in (tmp_path / "man/man1/tapfs.1").read_text()


def test_every_word_of_every_command_is_explained() -> None:
    unexplained = [
        f"{command.name} {word.options or word.value}"
        for _, commands in command_groups()
        for command in commands
        for _, words in command.groups
        for word in words
        if not word.help
    ]
    assert unexplained == []


#: Strings that are no variables for users: fields of the journal, and what a process tells those that it starts.
_NOT_FOR_USERS = {"DISK", "ERROR", "FILE", "OFFSET", "OPERATION", "IMAGE", "MAY_FETCH", "XEN_MACHINE"}


def test_the_page_of_tapfs_names_every_variable_of_the_environment(pages: dict[str, Path]) -> None:
    sources = [path.read_text() for path in (REPOSITORY / "tapfs").rglob("*.py")]
    names = {name for text in sources for name in re.findall(r"\"TAPFS_([A-Z_]+)\"", text)} - _NOT_FOR_USERS
    assert len(names) > 5
    page = pages["tapfs.1"].read_text()
    assert {name for name in names if f"TAPFS_{name}" not in page.replace("\\", "")} == set()
