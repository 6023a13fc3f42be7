"""The frame around every command: dispatch, exit codes, one line per error, signals, output errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapfs.cli import guard, main
from tapfs.cli.signals import Terminated
from tapfs.errors import CODES, EXIT_USAGE, ErrorKind, ImageError

Run = Callable[..., Any]


def test_help_names_every_command_and_every_exit_code(tapfs: Run) -> None:
    code, out, err = tapfs("--help")
    assert (code, err) == (0, "")
    for command in main.COMMANDS:
        assert re.search(rf"^  {command} ", out, re.MULTILINE), command
    for codes in CODES.values():
        assert re.search(rf"^  {codes.exit_code} ", out, re.MULTILINE), codes


@pytest.mark.parametrize("command", main.COMMANDS)
def test_each_command_explains_itself(tapfs: Run, command: str) -> None:
    code, out, err = tapfs(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: tapfs {command} ")


def test_help_is_a_command_too(tapfs: Run) -> None:
    assert tapfs("help") == tapfs("--help") == tapfs("help", "help")
    assert tapfs("help", "convert") == tapfs("convert", "--help")
    assert tapfs("help", "convert", "mount").code == EXIT_USAGE
    out = tapfs("help").out
    groups = [out.index(f"\n{title}:\n") for title in main.GROUPS]
    assert groups == sorted(groups)
    assert out.index("\n  resize ") < out.index("\nmounts")


@pytest.mark.parametrize("words", [("confert",), ("help", "confert"), ("Convert",)])
def test_a_mistyped_command_is_guessed(tapfs: Run, words: tuple[str, ...]) -> None:
    code, _, err = tapfs(*words)
    assert code == EXIT_USAGE
    assert "; did you mean convert?" in err


def test_options_may_stand_anywhere(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    target = tmp_path / "a"
    assert tapfs("convert", sample, "-f", "raw", target, "-O", "qcow") == (0, "", "")
    assert tapfs("create", tmp_path / "b", "-f", "raw", "1M") == (0, "", "")
    assert tapfs("convert", "-f", "raw", "-O", "qcow", "--", sample, target) == (0, "", "")


def test_version(tapfs: Run) -> None:
    code, out, _ = tapfs("--version")
    assert code == 0
    assert re.fullmatch(r"tapfs \d+\.\d+\.\d+\S*\n", out)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("frobnicate",),
        ("--frobnicate",),
        ("info",),
        ("info", "a", "b"),
        ("info", "--jso", "a"),
        ("convert", "only-source"),
        ("create", "-o", "cluster_size=9E", "name", "1M"),
        ("create", "-f", "raw", "name"),
        ("create", "-f", "raw", "name", "12Q"),
        ("create", "-f", "raw", "name", "-5"),
        ("create", "-f", "qcow", "-o", "=x", "name", "1M"),
        ("remove", "not-a-ram-disk"),
        ("map", "-s", "nowhere", "a"),
        ("info", "--progress", "loud", "a"),
    ],
)
def test_usage_errors_are_one_line_and_64(
    tapfs: Run, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = tapfs(*words)
    assert code == EXIT_USAGE == 64
    assert out == ""
    assert re.fullmatch(r"tapfs: error: .+; see 'tapfs[a-z ]* --help'\n", err)
    assert not list(tmp_path.iterdir())


def _ending_with(error: BaseException) -> int:
    def body() -> int:
        raise error

    return guard.guarded("tapfs", body)


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_of_error_is_one_line_and_its_code(capfd: pytest.CaptureFixture[str], kind: ErrorKind) -> None:
    code = _ending_with(ImageError(kind, "two\nlines", path="a\x1b[2Jb", offset=16, remedy="do this"))
    out, err = capfd.readouterr()
    assert code == CODES[kind].exit_code
    assert out == ""
    assert err == "tapfs: error: a\\x1b[2Jb: two lines (at byte 0x10); do this\n"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FileNotFoundError(2, "x", "/no/such"), 17, "tapfs: error: /no/such: cannot open: No such file or directory\n"),
        (OSError(28, "x"), 14, "tapfs: error: cannot write to standard output: No space left on device\n"),
        (MemoryError(), 10, "tapfs: error: cannot go on: Cannot allocate memory\n"),
        (KeyboardInterrupt(), 130, "tapfs: interrupted\n"),
        (Terminated(signal.SIGTERM), 143, "tapfs: ended by SIGTERM\n"),
    ],
)
def test_other_ends(capfd: pytest.CaptureFixture[str], error: BaseException, code: int, text: str) -> None:
    assert _ending_with(error) == code
    assert capfd.readouterr() == ("", text)


def test_a_bug_is_one_line_and_shows_its_traceback_on_request(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TAPFS_DEBUG", raising=False)
    assert _ending_with(ZeroDivisionError("a\nb")) == 70
    err = capfd.readouterr().err
    assert err == "tapfs: internal error: ZeroDivisionError: a b; please report; TAPFS_DEBUG=1 shows the traceback\n"
    monkeypatch.setenv("TAPFS_DEBUG", "1")
    assert _ending_with(ZeroDivisionError("a")) == 70
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_unwind_once_and_handlers_come_back(capfd: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    cleaned: list[str] = []

    def body() -> int:
        try:
            os.kill(os.getpid(), number)
            raise AssertionError("the signal did not arrive")
        finally:
            os.kill(os.getpid(), number)  # an impatient user
            cleaned.append("all")

    assert guard.guarded("tapfs", body) == 128 + number
    assert cleaned == ["all"]
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert {each: signal.getsignal(each) for each in before} == before


def test_who_ignores_a_signal_goes_on_ignoring_it(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def body() -> int:
            os.kill(os.getpid(), signal.SIGHUP)
            return 5

        assert guard.guarded("tapfs", body) == 5
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capfd.readouterr().err == ""


def test_a_reader_that_goes_away_is_no_error(tapfs_command: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([*tapfs_command, "--help"], stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert done.stderr == b""
    assert done.returncode == 141


def test_a_full_disk_behind_standard_output_is_an_error(tapfs_command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*tapfs_command, "--help"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == CODES[ErrorKind.NO_SPACE].exit_code
    assert done.stderr == b"tapfs: error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_a_file_takes_in_part_is_an_error(
    tapfs_command: list[str], tmp_path: Path, unbuffered: str
) -> None:
    """Without a buffer Python itself takes the part for the whole."""
    with (tmp_path / "short").open("wb") as short:
        done = subprocess.run(
            ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *tapfs_command, "--help"],
            stdout=short,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert done.stderr == b"tapfs: error: cannot write to standard output: File too large\n"
    assert done.returncode == CODES[ErrorKind.NO_SPACE].exit_code


def test_closed_standard_streams_do_no_harm(tapfs_command: list[str]) -> None:
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *tapfs_command, "--help"], check=False)
    assert done.returncode in (0, CODES[ErrorKind.IO].exit_code)


def test_only_what_a_command_needs_is_loaded(blktap_images: dict[str, Any]) -> None:
    """`tapfs info` must be quick: neither the other commands nor FUSE, trio or what builds the engine belong to it."""
    image = blktap_images["empty-2007-sparse"].path
    script = (
        "import sys\nfrom tapfs.cli.main import main\n"
        f"assert main(['info', {os.fspath(image)!r}]) == 0\n"
        "print(' '.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "tapfs.cli.commands.info" in loaded
    unwanted = {
        "tapfs.cli.commands.convert",
        "tapfs.cli.commands.mount",
        "tapfs.jobs.convert",
        "trio",
        "pyfuse3",
        "uuid",
    }
    unwanted |= {"json", "concurrent.futures", "importlib.metadata", "typing_extensions", "cffi"}
    unwanted |= {"locale", "zlib", "mmap", "select", "tapfs.formats.vhd.footer", "tapfs.formats.vhdx.signature"}
    unwanted |= {"tapfs.disk.json_text", "tapfs.disk.plugins", "base64", "difflib", "getpass"}
    assert loaded & unwanted == set()


@pytest.mark.parametrize("words", [["umount", "nothing-is-here"], ["list"]])
def test_commands_that_only_ask_start_without_an_event_loop(words: list[str]) -> None:
    script = f"import sys\nsys.modules['trio'] = None\nfrom tapfs.cli.main import main\nsys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, CODES[ErrorKind.NOT_FOUND].exit_code), done.stderr


def test_no_command_needs_fuse_to_be_listed() -> None:
    script = (
        "import sys\nsys.modules['pyfuse3'] = None\nsys.modules['trio'] = None\n"
        "from tapfs.cli.main import main\nsys.exit(main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mount" in done.stdout
