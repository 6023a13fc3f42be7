"""qcow-create, img2qcow and qcow2raw: their own argument order, and none of their bugs."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tapfs.cli import blktap_tools
from tapfs.errors import CODES, EXIT_USAGE, ErrorKind
from tests.conftest import REPOSITORY, sha256_of

Run = Callable[..., Any]
Tool = Callable[[list[str]], int]

#: The first 64 bytes of an image of the last `qcow-create 64 FILE` (docs/specs/blktap-qcow.md, "Extended header").
GOLDEN_64 = bytes.fromhex(
    "514649fb 00000001 0000000000000000 00000000 00000000 0000000004000000 0c09 0000 00000000"
    "0000000000001000 58454efb 91978a34 00000200 00000003"
)


def test_the_scripts_are_installed_under_their_names() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    seed_tools = {"qcow-create", "img2qcow", "qcow2raw"}
    assert set(project["scripts"]) == {"tapfs", "mount.fuse.tapfs", "block-tapfs", *seed_tools}
    for target in project["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


def _run(tool: Tool, *words: object) -> int:
    return tool([str(word) for word in words])


def test_create_is_byte_exact_with_the_original(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    assert _run(blktap_tools.qcow_create, 64, image) == 0
    content = image.read_bytes()
    assert len(content) == 8192
    assert content[:64] == GOLDEN_64


def test_create_with_the_space_reserved(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    assert _run(blktap_tools.qcow_create, "-r", 8, image) == 0
    assert image.stat().st_size == 8398848
    assert image.read_bytes()[48:64] == bytes.fromhex("58454efb 4b8fbc70 00000200 00000002")


def test_create_over_a_parent_honours_the_size(tapfs: Run, tmp_path: Path) -> None:
    base, image = tmp_path / "base.raw", tmp_path / "a.qcow"
    base.write_bytes(b"parent" * 1000)
    os.truncate(base, 10 << 20)
    assert _run(blktap_tools.qcow_create, 12, image, base) == 0
    head = image.read_bytes()[: 64 + len(str(base))]
    assert struct.unpack(">Q", head[24:32])[0] == 12 << 20
    assert head[32:34] == bytes.fromhex("090c")
    assert head[64:] == os.fsencode(base)
    ran = tapfs("compare", "-f", "raw", base, "--second-backing-format", "raw", image)
    assert ran == (0, "Images are identical but for their sizes.\n", "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), EXIT_USAGE),
        (("64",), EXIT_USAGE),
        (("0", "{}"), EXIT_USAGE),
        (("-5", "{}"), EXIT_USAGE),
        (("64M", "{}"), EXIT_USAGE),
        (("99999999999999999999", "{}"), EXIT_USAGE),
        (("-r", "8", "{}", "{}"), EXIT_USAGE),
        (("8", "{}/none/a"), CODES[ErrorKind.NOT_FOUND].exit_code),
        (("8", "{}", "{}.missing"), CODES[ErrorKind.NOT_FOUND].exit_code),
        (("-f", "nosuch", "8", "{}"), CODES[ErrorKind.UNSUPPORTED].exit_code),
    ],
)
def test_create_fails_with_a_code_and_one_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    assert _run(blktap_tools.qcow_create, *(word.format(tmp_path / "a") for word in words)) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("qcow-create: error: ")
    assert os.listdir(tmp_path) == []


def test_create_leaves_data_alone(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = tmp_path / "a"
    image.write_bytes(b"precious")
    assert _run(blktap_tools.qcow_create, 8, image) == CODES[ErrorKind.EXISTS].exit_code
    assert image.read_bytes() == b"precious"
    assert "--force" not in capfd.readouterr().err  # it has no such option


def test_the_destination_comes_first(sample: Path, tmp_path: Path) -> None:
    image, back = tmp_path / "a.qcow", tmp_path / "back.raw"
    assert _run(blktap_tools.img2qcow, image, sample) == 0
    assert image.read_bytes()[:4] == b"QFI\xfb"
    assert image.read_bytes()[48:52] == b"XEN\xfb"
    assert _run(blktap_tools.qcow2raw, back, image) == 0
    assert back.read_bytes() == sample.read_bytes()


def test_zeros_take_no_space(tmp_path: Path) -> None:
    source, image = tmp_path / "zeros.raw", tmp_path / "a.qcow"
    source.write_bytes(bytes(16 << 20))
    assert _run(blktap_tools.img2qcow, image, source) == 0
    assert image.stat().st_size == 8192


def test_a_partial_last_sector_is_kept(tmp_path: Path) -> None:
    source, image, back = tmp_path / "odd.raw", tmp_path / "a.qcow", tmp_path / "back.raw"
    source.write_bytes(b"x" * 5000)
    assert _run(blktap_tools.img2qcow, image, source) == 0
    assert _run(blktap_tools.qcow2raw, back, image) == 0
    assert back.read_bytes() == b"x" * 5000 + bytes(120)


def test_what_was_never_written_reads_as_zeros(blktap_images: dict[str, Any], tmp_path: Path) -> None:
    for name, fixture in blktap_images.items():
        if fixture.backing is None:
            assert _run(blktap_tools.qcow2raw, tmp_path / "back.raw", fixture.path) == 0
            assert sha256_of(tmp_path / "back.raw") == fixture.guest_sha256, name


def test_the_parent_is_honoured(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    image, back = tmp_path / "a.qcow", tmp_path / "back.raw"
    assert _run(blktap_tools.qcow_create, 4, image, sample) == 0
    assert _run(blktap_tools.qcow2raw, back, image) == 0
    assert back.read_bytes() == sample.read_bytes() + bytes((4 << 20) - sample.stat().st_size)


@pytest.mark.parametrize("tool", ["img2qcow", "qcow2raw"])
def test_a_failed_copy_is_one_line_and_leaves_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, tool: str
) -> None:
    assert _run(getattr(blktap_tools, tool), tmp_path / "a", tmp_path / "none") == CODES[ErrorKind.NOT_FOUND].exit_code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"{tool}: error: ")
    assert len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", ["qcow_create", "img2qcow", "qcow2raw"])
def test_help_says_the_order(function: str) -> None:
    script = f"import sys; from tapfs.cli.blktap_tools import {function}; sys.exit({function}())"
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if function == "qcow_create":
        assert "SIZE_MB FILE [BACKING]" in done.stdout
    else:
        assert "DEST SRC" in done.stdout
        assert "the DESTINATION comes first" in done.stdout


def test_a_relative_parent_is_written_by_its_real_path(
    tapfs: Run, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "link.raw").symlink_to(sample)
    monkeypatch.chdir(tmp_path)
    assert _run(blktap_tools.qcow_create, 4, "images/a.qcow", "link.raw") == 0
    assert Path("images/a.qcow").read_bytes()[64:].startswith(os.fsencode(sample))
    ran = tapfs("compare", "-f", "raw", sample, "--second-backing-format", "raw", "images/a.qcow")
    assert ran == (0, "Images are identical but for their sizes.\n", "")


def test_advice_names_no_option_that_they_lack(
    tapfs: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TAPFS_PASSWORD", raising=False)
    image, base, locked = tmp_path / "a.qcow", tmp_path / "base.qcow", tmp_path / "locked.qcow"
    key = tmp_path / "key"
    key.write_text("x\n")
    assert tapfs("create", "-f", "qcow", "--encrypt", "--key-file", key, locked, "1M").code == 0
    monkeypatch.setattr("os.open", _without_terminal(os.open))
    assert _run(blktap_tools.qcow2raw, tmp_path / "b", locked) == CODES[ErrorKind.DENIED].exit_code
    err = capfd.readouterr().err
    assert err.endswith("; set TAPFS_PASSWORD\n")
    assert "--key-file" not in err
    assert _run(blktap_tools.qcow_create, 4, base, tmp_path / "key") == 0
    assert _run(blktap_tools.qcow_create, 4, image, base) == 0
    assert _run(blktap_tools.qcow2raw, tmp_path / "b", image) == CODES[ErrorKind.DENIED].exit_code
    assert "; with tapfs convert: " in capfd.readouterr().err


def _without_terminal(real: Callable[..., int]) -> Callable[..., int]:
    def opened(path: object, *rest: Any, **options: Any) -> int:
        if path == "/dev/tty":
            raise OSError(6, "No such device or address")
        return real(path, *rest, **options)

    return opened
