"""Images whose parents are missing, refused or not to be trusted: info tells what it can, and map what it may."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as tapfs_package
from tapfs.disk.chain import OpenOptions
from tapfs.disk.inspection import inspect
from tapfs.disk.unopened_parent import ParentState
from tapfs.errors import ImageError
from tapfs.host.gate import Gate
from tests.conftest import Ran

Run = Callable[..., Ran]
MIB = 1 << 20


@pytest.fixture
def overlay(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An overlay in one folder over a raw disk in another, with one cluster of its own."""
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "ov"):
        Path(folder).mkdir()
    Path("base/b.raw").write_bytes(b"base" * (MIB // 4))
    assert tapfs("create", "-f", "qcow", "-b", "../base/b.raw", "-F", "raw", "ov/o.qcow").code == 0
    with tapfs_package.open("ov/o.qcow", writable=True) as disk:
        disk.write(4096, b"own" * 100)
    return Path("ov/o.qcow")


def rows(out: str) -> list[str]:
    """The lines without the white space between label and value."""
    return [re.sub(r" {2,}", " ", line).strip() for line in out.splitlines()]


def test_info_shows_the_facts_of_the_header(tapfs: Run, overlay: Path) -> None:
    whole = tapfs("info", overlay)
    assert "1: ov/../base/b.raw (raw, 1 MiB)" in rows(whole.out)
    os.unlink("base/b.raw")
    code, out, err = tapfs("info", overlay)
    assert (code, err) == (0, "")
    shown = rows(out)
    for row in (
        "format: qcow",
        "virtual size: 1 MiB (1048576 bytes)",
        "backing: ../base/b.raw",
        "cluster size: 512 bytes",
    ):
        assert row in shown
    assert shown[-1] == "1: ov/../base/b.raw (missing)"
    said = json.loads(tapfs("info", "--json", overlay).out)
    assert [link["state"] for link in said["chain"]] == ["open", "missing"]
    assert said["chain"][1] | {"message": ""} == {
        "path": "ov/../base/b.raw",
        "format": None,
        "virtual_size": None,
        "state": "missing",
        "message": "",
    }
    assert "is missing" in said["chain"][1]["message"]
    assert said["backing"] == {"name": "../base/b.raw", "path": None, "format": None}
    assert "partitions" not in said


def test_info_of_a_longer_chain(tapfs: Run, overlay: Path) -> None:
    assert tapfs("create", "-f", "qcow", "-b", "ov/o.qcow", "-F", "qcow", "top.qcow").code == 0
    os.unlink("base/b.raw")
    words = ("info", "--backing-format", "qcow", "top.qcow")
    code, out, _ = tapfs(*words)
    assert code == 0
    assert rows(out)[-3:] == [
        "chain: 0: top.qcow (qcow, 1 MiB)",
        "1: ov/o.qcow (qcow, 1 MiB)",
        "2: ov/../base/b.raw (missing)",
    ]
    described = json.loads(tapfs(*words, "--backing-chain", "--json").out)
    assert [each["path"] for each in described] == ["top.qcow", "ov/o.qcow"]
    assert [link["state"] for link in described[1]["chain"]] == ["open", "missing"]


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [
        ("foreign", 12, "is a Bochs image, which tapfs does not read"),
        ("guessed chain", 19, "names a further file"),
        ("loop", 2, "comes back to this file"),
        ("outside", 19, "lies outside base"),
        ("fifo", 11, "is a fifo"),
    ],
)
def test_a_parent_that_is_refused_is_an_error_after_the_facts(
    tapfs: Run, overlay: Path, kind: str, code: int, says: str
) -> None:
    parent = Path("base/b.raw")
    parent.unlink()
    options: list[str] = []
    match kind:
        case "foreign":
            parent.write_bytes(b"Bochs Virtual HD Image" + bytes(4096))
        case "guessed chain":
            assert tapfs("create", "-f", "qcow", "-b", "/etc/hostname", "-F", "raw", parent, "1M").code == 0
        case "loop":
            parent.symlink_to("../ov/o.qcow")
            options = ["--backing-format", "qcow"]
        case "outside":
            options = ["--backing-root", "base"]
            Path("elsewhere").mkdir()
            parent.symlink_to("../elsewhere/x")
        case _:
            os.mkfifo(parent)
    ended, out, err = tapfs("info", *options, overlay)
    assert ended == code
    assert says in err
    assert rows(out)[-1] == "1: ov/../base/b.raw (refused)"
    assert "virtual size: 1 MiB (1048576 bytes)" in rows(out)
    ended, out, err = tapfs("info", "--json", *options, overlay)
    assert ended == code
    (link,) = json.loads(out)["chain"][1:]
    assert (link["state"], says in link["message"]) == ("refused", True)
    assert err.count("\n") == 1


def test_map_says_what_to_do(tapfs: Run, overlay: Path) -> None:
    os.unlink("base/b.raw")
    code, out, err = tapfs("map", overlay)
    assert (code, out) == (17, "")
    assert err.endswith("is missing; name it with --backing FILE, or map this image alone with --no-backing\n")


def test_a_map_of_the_image_alone(tapfs: Run, overlay: Path) -> None:
    whole = json.loads(tapfs("map", "--json", overlay).out)
    os.unlink("base/b.raw")
    alone = json.loads(tapfs("map", "--json", "--no-backing", overlay).out)
    assert [run for run in alone if run["present"]] == [run for run in whole if run["depth"] == 0]
    assert sum(run["length"] for run in alone) == MIB
    unknown = [run for run in alone if not run["present"]]
    assert [(run["depth"], run["zero"], run["data"]) for run in unknown] == [(1, False, False)] * 2
    assert tapfs("map", "--no-backing", overlay).out.count("ov/o.qcow") == 1


def test_a_map_alone_of_an_image_without_a_parent(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    assert tapfs("create", "-f", "qcow", image, "1M").code == 0
    assert tapfs("map", "--json", "--no-backing", image) == tapfs("map", "--json", image)


@pytest.mark.parametrize("command", ["info", "map", "check"])
def test_without_backing_nothing_that_the_header_names_is_opened(tapfs: Run, overlay: Path, command: str) -> None:
    """A fifo with a writer that waits: whoever opened it, or looked at it by opening, would let the writer go."""
    os.unlink("base/b.raw")
    missing = tapfs(command, "--no-backing", overlay)
    os.mkfifo("base/b.raw")
    let_go = threading.Event()

    def write() -> None:
        descriptor = os.open("base/b.raw", os.O_WRONLY)
        let_go.set()
        os.close(descriptor)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        there = tapfs(command, "--no-backing", overlay)
        assert not let_go.is_set()
    finally:
        os.close(os.open("base/b.raw", os.O_RDONLY))
        writer.join()
    # What is there makes no difference, not even whether it is.
    assert missing == there
    assert there.code == 0
    if command == "info":
        assert rows(there.out)[-1] == "1: ov/../base/b.raw (not looked at)"


@pytest.mark.parametrize("words", [["--backing", "x"], ["--backing-root", "."], ["--backing-format", "raw"]])
def test_without_backing_no_word_about_it_makes_sense(tapfs: Run, overlay: Path, words: list[str]) -> None:
    code, out, err = tapfs("info", "--no-backing", *words, overlay)
    assert (code, out) == (64, "")
    assert "--no-backing looks at no parent" in err


def test_in_python(overlay: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with inspect(str(overlay), OpenOptions()) as found:
        assert found.unopened is None
        assert "partitions" in found.infos()[0]
    os.unlink("base/b.raw")
    with inspect(str(overlay), OpenOptions()) as found:
        assert found.unopened is not None
        assert found.unopened.state is ParentState.MISSING
        assert len(found.infos()) == 1
    with inspect(str(overlay), OpenOptions(gate=Gate.nothing())) as found:
        assert found.unopened is not None
        assert (found.unopened.state, found.unopened.error) == (ParentState.NOT_LOOKED_AT, None)
    assert len(os.listdir("/proc/self/fd")) == before


def test_info_in_python(overlay: Path) -> None:
    def states(**options: Any) -> list[str]:
        return [link["state"] for link in tapfs_package.info(overlay, **options)["chain"]]

    assert states() == ["open", "open"]
    assert states(gate=Gate.nothing()) == ["open", "not looked at"]
    os.unlink("base/b.raw")
    assert states() == ["open", "missing"]
    Path("base/b.raw").write_bytes(b"Bochs Virtual HD Image" + bytes(4096))
    with pytest.raises(ImageError, match="is a Bochs image"):
        states()
    assert states(gate=Gate.nothing()) == ["open", "not looked at"]


def test_an_encrypted_image_whose_parent_is_missing(tapfs: Run, tmp_path: Path) -> None:
    key, base, image = tmp_path / "key", tmp_path / "base.raw", tmp_path / "a.qcow"
    key.write_text("secret\n")
    base.write_bytes(bytes(MIB))
    words = ("create", "-f", "qcow", "--encrypt", "--key-file", key, "-b", base, "-F", "raw", image)
    assert tapfs(*words).code == 0
    base.unlink()
    for options in ((), ("--key-file", key)):
        code, out, err = tapfs("info", *options, image)
        assert (code, err) == (0, "")
        assert "encrypted: yes" in rows(out)
        assert rows(out)[-1] == f"1: {base} (missing)"
