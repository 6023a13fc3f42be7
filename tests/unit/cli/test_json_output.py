"""Errors of commands that print JSON: an object on standard output, and the line on stderr as ever."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapfs.cli import guard
from tapfs.cli.json_output import wants_json
from tapfs.errors import EXIT_USAGE, ErrorKind, ImageError

Run = Callable[..., Any]


@pytest.mark.parametrize("option", [("--json",), ("--output=json",), ("--output", "json")], ids=" ".join)
@pytest.mark.parametrize("command", ["info", "map", "check", "repair", "compare"])
def test_an_error_is_an_object(tapfs: Run, tmp_path: Path, command: str, option: tuple[str, ...]) -> None:
    image = tmp_path / "none"
    code, out, err = tapfs(command, *option, image, *([image] if command == "compare" else []))
    error = json.loads(out)["error"]
    assert (error["kind"], error["path"], error["exit_code"]) == ("not_found", str(image), code)
    assert set(error) == {"kind", "message", "path", "offset", "operation", "remedy", "exit_code"}
    assert err == f"tapfs: error: {image}: {error['message']}\n"


def test_without_json_there_is_none(tapfs: Run, tmp_path: Path) -> None:
    for words in (("info",), ("info", "--output=human"), ("info", "--")):
        assert tapfs(*words, tmp_path / "none").out == ""


def test_a_wrong_command_line(tapfs: Run) -> None:
    code, out, _ = tapfs("info", "--json")
    assert code == EXIT_USAGE
    error = {"kind": "usage", "message": "IMAGE is missing", "exit_code": EXIT_USAGE}
    assert json.loads(out) == {"version": 1, "error": error}


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ImageError(ErrorKind.CORRUPT, "x", path="p", offset=5, op="o", remedy="r"), "corrupt", 2),
        (FileNotFoundError(2, "x", "/p"), "not_found", 17),
        (MemoryError(), "io", 10),
        (KeyboardInterrupt(), "interrupted", 130),
        (ZeroDivisionError("x"), "bug", 70),
    ],
)
def test_every_kind(capfd: pytest.CaptureFixture[str], error: BaseException, kind: str, code: int) -> None:
    def body() -> int:
        raise error

    assert guard.guarded("tapfs", body, json=True) == code
    found = json.loads(capfd.readouterr().out)["error"]
    assert (found["kind"], found["exit_code"]) == (kind, code)


def test_a_document_that_is_cut_short_gets_no_second_one(
    tapfs: Run, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tapfs.disk import disk_map

    def broken(*_: object, **__: object) -> Any:
        yield from ()
        raise ImageError(ErrorKind.IO, "cannot read")

    monkeypatch.setattr(disk_map.DiskMap, "lines", broken)
    code, out, err = tapfs("map", "--json", "-f", "raw", sample)
    assert (code, out, err) == (10, "", "tapfs: error: cannot read\n")


def test_a_name_that_is_no_utf_8(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"a\xff.raw")
    image.write_bytes(bytes(512))
    for words in (("info", "--json"), ("check", "--json")):
        found = json.loads(tapfs(*words, image).out)
        assert base64.b64decode(found["path_base64"]) == os.fsencode(image)
        assert found["path"] == f"{tmp_path}/a\ufffd.raw"
    error = json.loads(tapfs("info", "--json", f"{image}.none").out)["error"]
    assert base64.b64decode(error["path_base64"]) == os.fsencode(f"{image}.none")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["info", "a", "--json"], True),
        (["info", "--", "--json"], False),
        (["info", "--output", "human"], False),
        (["list", "--output", "json"], True),
        (["convert", "--progress", "json"], False),
    ],
)
def test_who_wants_json(words: list[str], *, wanted: bool) -> None:
    assert wants_json(words) is wanted
