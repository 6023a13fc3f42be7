"""`tapfs check -r` and `tapfs repair`: what they mend and that they say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapfs.errors import CODES, EXIT_USAGE, ErrorKind

Run = Callable[..., Any]
LEAK = b"leak" * 4096


@pytest.fixture
def image(tapfs: Run, sample: Path, tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow"
    assert tapfs("convert", "-f", "raw", "-O", "qcow", sample, path) == (0, "", "")
    return path


@pytest.fixture
def leaking(image: Path) -> Path:
    with image.open("ab") as file:
        file.write(LEAK)
    return image


@pytest.fixture
def corrupt(leaking: Path) -> Path:
    with leaking.open("r+b") as file:
        file.seek(0x30)  # the first L1 entry
        file.write((1 << 50).to_bytes(8, "big"))
    return leaking


@pytest.mark.parametrize("words", [("check", "-r", "leaks"), ("check", "-r", "all"), ("repair",)], ids=" ".join)
def test_leaks(tapfs: Run, leaking: Path, words: tuple[str, ...]) -> None:
    assert tapfs("check", "-q", leaking).code == 3
    code, out, err = tapfs(*words, leaking)
    assert (code, err) == (0, "")
    assert out.startswith(f"mended: leaked space of {len(LEAK)} bytes\n")
    assert leaking.read_bytes().count(b"leak") == 0
    code, out, _ = tapfs(*words, leaking)
    assert (code, "mended" in out) == (0, False)
    assert json.loads(tapfs(*words, "--json", leaking).out)["mended"] == []


def test_leaks_only_leaves_errors_alone(tapfs: Run, corrupt: Path) -> None:
    before = corrupt.read_bytes()
    code, out, _ = tapfs("check", "-r", "leaks", corrupt)
    assert code == CODES[ErrorKind.CORRUPT].exit_code
    assert "mended" not in out
    assert corrupt.read_bytes() == before
    assert tapfs("check", "-r", "both", corrupt).code == EXIT_USAGE


def test_a_dry_run_names_what_would_be_mended(tapfs: Run, leaking: Path, tmp_path: Path) -> None:
    out = tapfs("repair", "-n", leaking).out
    assert out.startswith(f"would mend: leaked space of {len(LEAK)} bytes\nstage 1: free ")
    assert json.loads(tapfs("repair", "-n", "--json", leaking).out)["mends"] == [f"leaked space of {len(LEAK)} bytes"]
    assert leaking.read_bytes().endswith(LEAK)
    clean = tmp_path / "clean.qcow"
    shutil.copy(leaking, clean)
    assert tapfs("repair", clean).code == 0
    assert tapfs("repair", clean).out.splitlines()[0] == f"{clean}: nothing to repair"
    assert tapfs("repair", "-q", clean) == (0, "", "")


def test_an_old_image_of_blktap(tapfs: Run, blktap_images: dict[str, Any], tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    shutil.copy(blktap_images["standalone-2007-le-l1"].path, image)
    mended = json.loads(tapfs("repair", "--json", image).out)["mended"]
    assert mended == ["the L1 table was little-endian; the extended header was not of the last form"]
    assert "written by" not in tapfs("check", image).out


def test_one_of_a_thing_is_no_plural(tapfs: Run, leaking: Path) -> None:
    assert tapfs("check", leaking).out.splitlines()[-1].startswith(f"{leaking}: 1 leak (16 KiB), no errors; ")
