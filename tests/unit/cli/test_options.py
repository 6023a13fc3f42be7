"""Sizes, -o pairs and where passwords come from."""

from __future__ import annotations

import os
import pty
import sys
from pathlib import Path

import pytest

from tapfs.cli import options
from tapfs.cli.parser import UsageError, parse_options
from tapfs.cli.sizes import human_size, parse_size
from tapfs.errors import ErrorKind, ImageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("700", 700),
        ("700B", 700),
        ("64k", 65536),
        ("64K", 65536),
        ("1M", 1 << 20),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("0.1K", 102),
        ("7E", 7 << 60),
        ("10.5G", 21 << 29),
        ("1.G", 1 << 30),
        ("1GiB", 1 << 30),
        ("1gib", 1 << 30),
        ("10MB", 10_000_000),
        ("2.5kb", 2500),
        ("64KB", 64000),
        ("64KiB", 65536),
        (str((1 << 63) - 1), (1 << 63) - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


NO_SIZES = (
    *("", "K", "KiB", ".5K", "-1", "+1", "1e3", "1KK", "1BB", "1KBB", "1iB", "1MiG", "10.5", "10.", "10.5B"),
    *("0x10", "1 0", "٣", "nan", "8E", "9" * 5000, "1." + "0" * 50),
)


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(not a size|size too large)"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1 << 30, "1 GiB"),
        (10 << 20, "10 MiB"),
        (100 << 20, "100 MiB"),
        (123456789, "118 MiB"),
        (1 << 63, "8 EiB"),
    ],
)
def test_human_sizes(size: int, text: str) -> None:
    assert human_size(size) == text


def test_option_pairs() -> None:
    assert parse_options(["a=1,b", "c=x=y"], "p") == {"a": "1", "b": "on", "c": "x=y"}
    with pytest.raises(UsageError):
        parse_options(["a=1,,b=2"], "p")


def _needs_password(password: bytes | None) -> bytes:
    if password is None:
        raise ImageError(ErrorKind.DENIED, "is encrypted", op="unlock")
    return password


@pytest.mark.parametrize(
    ("content", "password"),
    [(b"pw\n", b"pw"), (b"pw", b"pw"), (b"p w \r\nsecond\n", b"p w "), (b"\xff\x00x\n", b"\xff\x00x")],
)
def test_the_first_line_of_a_key_file(tmp_path: Path, content: bytes, password: bytes) -> None:
    key = tmp_path / "key"
    key.write_bytes(content)
    assert options.unlocked(str(key), "a", _needs_password) == password


@pytest.mark.parametrize("content", [b"", b"\n", b"\nsecond\n"])
def test_an_empty_password_is_none(tmp_path: Path, content: bytes) -> None:
    key = tmp_path / "key"
    key.write_bytes(content)
    with pytest.raises(ImageError, match="is empty") as caught:
        options.unlocked(str(key), "a", _needs_password)
    assert caught.value.kind is ErrorKind.DENIED


def test_a_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="read the key file") as caught:
        options.unlocked(str(tmp_path / "none"), "a", _needs_password)
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_the_environment_comes_after_the_key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPFS_PASSWORD", "from the environment")
    assert options.unlocked(None, "a", _needs_password) == b"from the environment"
    key = tmp_path / "key"
    key.write_bytes(b"from the file\n")
    assert options.unlocked(str(key), "a", _needs_password) == b"from the file"


def test_nothing_is_asked_for_an_image_that_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAPFS_PASSWORD", raising=False)
    monkeypatch.setattr(options, "prompt_for_password", lambda _: pytest.fail("asked"))
    assert options.unlocked(None, "a", lambda password: password) is None


def test_other_refusals_do_not_lead_to_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAPFS_PASSWORD", raising=False)
    monkeypatch.setattr(options, "prompt_for_password", lambda _: pytest.fail("asked"))

    def refuse(_: bytes | None) -> None:
        raise ImageError(ErrorKind.DENIED, "no permission", op="open")

    with pytest.raises(ImageError, match="no permission"):
        options.unlocked(None, "a", refuse)


def _at_a_terminal(script: str, typed: bytes) -> tuple[int, bytes]:
    """Exit code and output of a program in a session of its own whose terminal is the slave of a pty.

    It is typed to when it asks for a password.
    """
    child, master = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", script])  # noqa: S606 - the child of a pty
    output = b""
    waiting = typed
    while True:
        try:
            piece = os.read(master, 1000)
        except OSError:
            break
        if not piece:
            break
        output += piece
        if b"Password of a: " in output and waiting:
            os.write(master, waiting)
            waiting = b""
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


_PROMPT = (
    "import sys\nfrom tapfs.cli.guard import guarded\nfrom tapfs.cli.options import prompt_for_password\n"
    "def body():\n    print('got', prompt_for_password('Password of a: ').hex())\n    return 0\n"
    "sys.exit(guarded('tapfs', body))"
)


def test_the_terminal_is_asked_last_and_shows_nothing() -> None:
    code, output = _at_a_terminal(_PROMPT, b"se cret\n")
    assert code == 0
    assert b"got " + b"se cret".hex().encode() in output
    assert b"se cret" not in output


@pytest.mark.parametrize(
    ("key", "code", "line"),
    [(b"\x03", 130, b"tapfs: interrupted"), (b"\x04", 19, b"tapfs: error: no password was given")],
)
def test_leaving_the_question(key: bytes, code: int, line: bytes) -> None:
    """The message stands on a line of its own, not behind the question."""
    assert _at_a_terminal(_PROMPT, key) == (code, b"Password of a: \r\n" + line + b"\r\n")


def test_a_new_password_is_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAPFS_PASSWORD", raising=False)
    answers = iter([b"one", b"two", b"same", b"same"])
    monkeypatch.setattr(options, "prompt_for_password", lambda _: next(answers))
    with pytest.raises(ImageError, match="differ"):
        options.new_password(None, "a")
    assert options.new_password(None, "a") == b"same"
