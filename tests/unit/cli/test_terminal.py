"""Names that others have chosen reach neither a terminal nor a log as anything but printable characters."""

from __future__ import annotations

import ast
import io
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tapfs.cli import reporting
from tapfs.errors import ErrorKind, ImageError, printable
from tapfs.serving import log
from tests.conftest import REPOSITORY, Ran

Run = Callable[..., Ran]
MIB = 1 << 20

#: A title of the terminal, red, a line of its own, a bell, C1 controls, and a turn of the direction of writing.
NASTY = "\x1b]0;title\x07\x1b[31mred\nfake: line\r\x9b2J\u202etxt.\u2066"
SHOWN = r"\x1b]0;title\x07\x1b[31mred\nfake: line\r\x9b2J\u202etxt.\u2066"

#: Those that write to a terminal or a log by themselves, and have no names in it or make them printable.
WRITERS = {
    "reporting.py",
    "json_output.py",
    "guard.py",
    "progress.py",
    "parser.py",
    "main.py",
    "entry.py",
    "signals.py",
}


def in_lines(text: str) -> bool:
    """Whether there is nothing but printable characters and line ends."""
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe 漢字 ☃", "größe 漢字 ☃"),
        (r"C:\new", r"C:\new"),
        (NASTY, SHOWN),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("", ""),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_errors_are_one_line() -> None:
    error = ImageError(ErrorKind.IO, f"parent {NASTY}", path=NASTY, remedy=f"see {NASTY}")
    assert str(error).isprintable()
    assert str(error).startswith(f"{SHOWN}: parent ")
    assert error.message == f"parent {NASTY}"


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    reporting.print_columns([("NAME", "SIZE"), (NASTY, "7")])
    reporting.print_table([(NASTY, NASTY)])
    reporting.print_line(NASTY)
    out = capsys.readouterr().out
    assert in_lines(out)
    assert out.splitlines() == ["NAME".ljust(len(SHOWN)) + "  SIZE", f"{SHOWN}  7", f"{SHOWN}: {SHOWN}", SHOWN]


def test_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr("syslog.syslog", lambda _priority, text: sent.append(text))
    stream = io.StringIO()
    for handler in (log.SyslogHandler(), logging.StreamHandler(stream)):
        handler.setFormatter(log.PrintableFormatter("tapfs: %(message)s"))
        record = logging.LogRecord("tapfs", logging.ERROR, "", 0, "of %s", (NASTY,), None)
        handler.emit(record)
    assert sent == [f"tapfs: of {SHOWN}"]
    assert stream.getvalue() == f"tapfs: of {SHOWN}\n"


def test_a_traceback_in_the_log_keeps_its_lines() -> None:
    try:
        raise ValueError(NASTY)
    except ValueError as error:
        record = logging.LogRecord(
            "tapfs", logging.ERROR, "", 0, "failed", (), (ValueError, error, error.__traceback__)
        )
    text = log.PrintableFormatter("%(message)s").format(record)
    assert in_lines(text)
    assert text.splitlines()[:2] == ["failed", "Traceback (most recent call last):"]


@pytest.fixture
def nasty(tmp_path: Path, tapfs: Run) -> Path:
    """A raw disk with a nasty name and a nasty partition name, and an overlay over it."""
    image = tmp_path / f"{NASTY}.raw"
    image.touch()
    os.truncate(image, 8 * MIB)
    script = f'label: gpt\nstart=2048, name="{NASTY.replace(chr(10), "")}"\n'
    subprocess.run(["sfdisk", "-q", image], input=script.encode(), check=True)
    overlay = tmp_path / f"over{NASTY}.qcow"
    assert tapfs("create", "-f", "qcow", "-b", image, "-F", "raw", overlay) == (0, "", "")
    return overlay


def test_every_command(tapfs: Run, nasty: Path) -> None:
    image = nasty.parent / f"{NASTY}.raw"
    for words in (
        ["info", nasty],
        ["info", "-v", nasty],
        ["info", image],
        ["map", nasty],
        ["map", image],
        ["check", nasty],
        ["repair", "-n", nasty],
        ["repair", nasty],
        ["compare", nasty, image],
        ["convert", "-O", "raw", nasty, nasty],
        ["create", "-f", "raw", image, "1M"],
        ["list"],
        ["umount", nasty],
        ["mount", image, nasty],
        ["info", "-f", NASTY, image],
        ["convert", image, nasty.parent / f"{NASTY}.qcow"],
        [NASTY],
        ["info", f"--{NASTY}", image],
        ["remove", f"ram:{NASTY}"],
    ):
        _, out, err = tapfs(*words)
        assert in_lines(out + err), words
        assert err.count("\n") <= 1, words
    assert SHOWN in tapfs("info", image).out
    assert "\x1b" not in tapfs("info", image).out


def test_a_parent_that_is_missing(tapfs: Run, nasty: Path) -> None:
    (nasty.parent / f"{NASTY}.raw").unlink()
    code, out, err = tapfs("map", nasty)
    assert code == 17
    assert in_lines(out + err)
    assert "is missing" in err
    assert "]0;title" in err


def calls(tree: ast.AST) -> Iterator[str]:
    """What the calls in a module call."""
    yield from (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_commands_print_by_the_mechanism() -> None:
    """A print of a command's own would be forgotten where a name comes into it later."""
    for path in sorted(Path(REPOSITORY, "tapfs/cli").rglob("*.py")):
        if path.name in WRITERS:
            continue
        found = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and node.args
        ]
        assert not found, path


def test_there_is_one_mechanism() -> None:
    """FUSE's own names are shorter than a line: outside.py replaces what is not printable."""
    users = {
        path.name
        for path in Path(REPOSITORY, "tapfs").rglob("*.py")
        if any(name.endswith(".isprintable") for name in calls(ast.parse(path.read_text())))
    }
    assert users == {"errors.py", "outside.py"}
