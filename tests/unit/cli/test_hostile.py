"""Hostile input through the real command line: one line, a documented exit code, bounded time and memory."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapfs.errors import CODES, ErrorKind

Run = Callable[..., Any]

#: Address space that any command must do with, whatever an image says. Generous: a thread's stack
#: alone takes 8 MiB of it, the interpreter and its libraries take about 100 MiB.
ADDRESS_SPACE = 600 << 20
SECONDS = 30

_PR_CAPBSET_DROP = 24

DOCUMENTED = {codes.exit_code for codes in CODES.values()}


def _limit() -> None:
    # A sanitizer reserves terabytes of addresses for itself, so it goes without this limit.
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


@pytest.fixture
def refused(tapfs_process: Run) -> Callable[..., str]:
    """Run a command that must be refused with one of `kinds`; the line that it says."""

    def run(*words: object, kinds: set[ErrorKind], **options: object) -> str:
        ran = tapfs_process(*words, timeout=SECONDS, **({"preexec_fn": _limit} | options))
        assert len(ran.err.splitlines()) == 1, ran.err
        line: str = ran.err
        assert line.startswith("tapfs: error: ")
        assert ran.code in {CODES[kind].exit_code for kind in kinds}, (ran.code, line)
        return line

    return run


#: Several commands in one process, for the time that starting Python takes.
_IN_TURN = """
import json, sys
from tapfs.cli.main import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    sys.stderr.write(f"\\n{code}\\0")
"""

#: What a command says of an image that is cut within its magic.
_TAKEN_FOR_RAW = (
    "the name ends in .qcow, and nothing in the file shows that format: it is taken for raw;"
    " its header may be lost, or it is a part of a disk"
)


@pytest.fixture
def survived(tmp_path: Path) -> Callable[[Path], None]:
    """Run the reading commands on a damaged image: each succeeds, or is refused in one line."""

    def run(image: Path) -> None:
        target = tmp_path / "target.raw"
        commands = [
            ["info", "--json", str(image)],
            ["map", "--json", str(image)],
            ["check", str(image)],
            ["convert", "-f", "qcow", "-O", "raw", str(image), str(target)],
        ]
        done = subprocess.run(
            [sys.executable, "-c", _IN_TURN, json.dumps(commands)],
            capture_output=True,
            check=False,
            timeout=SECONDS,
            preexec_fn=_limit,
        )
        assert done.returncode == 0, done.stderr
        ends = done.stderr.decode().split("\0")[:-1]
        assert len(ends) == len(commands)
        for words, end in zip(commands, ends, strict=True):
            err, _, code = end.rpartition("\n")
            if code == "0" or (words[0] == "check" and code in ("2", "3", "63") and not err):
                assert err in ("", f"tapfs: {image}: {_TAKEN_FOR_RAW}\n"), words
            else:
                assert int(code) in DOCUMENTED, (words, code)
                assert len(err.splitlines()) == 1, (words, err)
        assert target.exists() == (ends[-1] == "\n0")
        target.unlink(missing_ok=True)

    return run


@pytest.fixture
def image(tapfs: Run, sample: Path, tmp_path: Path) -> Path:
    """A good compressed and plain qcow image, QEMU's layout."""
    path = tmp_path / "good.qcow"
    assert tapfs("convert", "-c", "-f", "raw", "-O", "qcow", sample, path).code == 0
    return path


def _patched(image: Path, offset: int, data: bytes) -> Path:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return image


@pytest.mark.parametrize("length", [0, 1, 3, 4, 8, 20, 47, 48, 49, 55, 63, 64, 100, 512, 4096])
def test_truncated_in_the_header(survived: Run, image: Path, length: int) -> None:
    os.truncate(image, length)
    survived(image)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_truncated_further_on(survived: Run, refused: Run, image: Path, tmp_path: Path, share: float) -> None:
    os.truncate(image, int(image.stat().st_size * share))
    survived(image)
    refused("convert", "-O", "raw", image, tmp_path / "b", kinds={ErrorKind.CORRUPT})


@pytest.mark.parametrize("length", [0, 3, 47])
def test_a_named_format_that_it_cannot_be(refused: Run, image: Path, length: int) -> None:
    os.truncate(image, length)
    refused("info", "-f", "qcow", image, kinds={ErrorKind.INVALID_FORMAT, ErrorKind.CORRUPT})


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (4, struct.pack(">I", 3)),
        (8, struct.pack(">QI", 1 << 62, 1000)),
        (8, struct.pack(">QI", 48, 0xFFFFFFFF)),
        (8, struct.pack(">QI", 1 << 63, 8)),
        (8, struct.pack(">QI", (1 << 64) - 1, 1023)),
        (24, struct.pack(">Q", 0)),
        (24, struct.pack(">Q", 1)),
        (24, struct.pack(">Q", 1 << 63)),
        (24, struct.pack(">Q", (1 << 64) - 1)),
        (24, struct.pack(">Q", (1 << 63) - 512)),
        (32, b"\x08"),
        (32, b"\x11"),
        (32, b"\x00"),
        (32, b"\xff"),
        (33, b"\x05"),
        (33, b"\x0e"),
        (33, b"\xff"),
        (36, struct.pack(">I", 2)),
        (40, struct.pack(">Q", 1 << 62)),
        (40, struct.pack(">Q", (1 << 64) - 8)),
    ],
)
def test_headers_that_cannot_be(survived: Run, refused: Run, image: Path, offset: int, data: bytes) -> None:
    _patched(image, offset, data)
    survived(image)
    kinds = {ErrorKind.INVALID_FORMAT, ErrorKind.UNSUPPORTED, ErrorKind.CORRUPT, ErrorKind.OUT_OF_BOUNDS}
    refused("convert", "-f", "qcow", "-O", "raw", image, image.with_name("b"), kinds=kinds)


def test_the_largest_disk_is_read_in_bounds(tapfs: Run, tapfs_process: Run, tmp_path: Path) -> None:
    """As large as the header can say with a level-1 table that is really there: sparse, and quick to list."""
    image = tmp_path / "a.qcow"
    assert tapfs("create", "-f", "qcow", image, "2T").code == 0
    for words in (["info", "--json", image], ["check", image], ["map", "--json", "-l", "32G", image]):
        ran = tapfs_process(*words, timeout=SECONDS, preexec_fn=_limit)
        assert (ran.code, ran.err) == (0, "")
    assert '"length": 34359738368' in ran.out


def test_tables_that_point_where_nothing_can_be(survived: Run, refused: Run, image: Path) -> None:
    for entry in (1, 0x30, 7, 1 << 40, (1 << 63) | 5, (1 << 64) - 1, 1 << 63):
        _patched(image, 0x30, struct.pack(">Q", entry))
        survived(image)
        refused("convert", "-O", "raw", image, image.with_name("b"), kinds={ErrorKind.CORRUPT})


def test_tables_that_overlap(survived: Run, image: Path) -> None:
    with image.open("rb") as file:
        file.seek(0x30)
        first = file.read(8)
    _patched(image, 0x38, first)
    survived(image)


def test_garbage_in_compressed_data(survived: Run, refused: Run, image: Path, tmp_path: Path) -> None:
    size = image.stat().st_size
    good = image.read_bytes()
    with image.open("rb") as file:
        file.seek(0x30)
        l2_offsets = [offset for offset in struct.unpack(">2Q", file.read(16)) if offset]
    (entry,) = struct.unpack_from(">Q", good, l2_offsets[0])
    assert entry >> 63, "the first cluster of the sample should be compressed"
    payload = entry & ((1 << 51) - 1)
    _patched(image, payload, b"\xff" * 20)
    survived(image)
    line = refused("convert", "-O", "raw", image, tmp_path / "b", kinds={ErrorKind.CORRUPT})
    assert f"{payload:#x}" in line
    assert image.stat().st_size == size


def test_every_byte_of_the_metadata_noise(survived: Run, image: Path) -> None:
    """Noise instead of each table in turn."""
    good = image.read_bytes()
    noise = bytes((number * 167 + 13) % 256 for number in range(4096))
    (l2_offset,) = struct.unpack_from(">Q", good, 0x30)
    for offset, length in ((32, 16), (40, 8), (0x30, 16), (l2_offset, 4096), (l2_offset, 8)):
        image.write_bytes(good)
        _patched(image, offset, noise[:length])
        survived(image)


def _overlay(tapfs: Run, path: Path, backing: Path) -> Path:
    assert tapfs("create", "-f", "qcow", "-b", backing, "-F", "qcow", path, "1M").code == 0
    return path


def test_chains_that_come_back(tapfs: Run, refused: Run, tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow", tmp_path / "top.qcow"
    assert tapfs("create", "-f", "qcow", base, "1M").code == 0
    _overlay(tapfs, top, base)
    shutil.copy(top, tmp_path / "copy.qcow")
    base.unlink()
    base.symlink_to(top)
    many = ["--backing-format", "qcow"] * 5
    refused("info", *many, top, kinds={ErrorKind.CORRUPT})
    refused("info", *many, tmp_path / "copy.qcow", kinds={ErrorKind.CORRUPT})


def test_a_missing_parent_is_named(tapfs: Run, refused: Run, tmp_path: Path) -> None:
    base = tmp_path / "base.qcow"
    assert tapfs("create", "-f", "qcow", base, "1M").code == 0
    top = _overlay(tapfs, tmp_path / "top.qcow", base)
    base.unlink()
    line = refused("convert", "-O", "raw", top, tmp_path / "b", kinds={ErrorKind.NOT_FOUND})
    assert str(base) in line
    assert "--backing" in line


def test_a_parent_outside_the_root(tapfs: Run, refused: Run, tmp_path: Path) -> None:
    base = tmp_path / "base.qcow"
    assert tapfs("create", "-f", "qcow", base, "1M").code == 0
    top = _overlay(tapfs, tmp_path / "top.qcow", base)
    (tmp_path / "inner").mkdir()
    assert tapfs("info", "--backing-root", tmp_path, top).code == 0
    refused("info", "--backing-root", tmp_path / "inner", top, kinds={ErrorKind.DENIED})


@pytest.mark.parametrize("command", ["info", "map", "check", "convert", "compare"])
def test_what_is_no_image_file(refused: Run, tmp_path: Path, command: str) -> None:
    folder, fifo, device = tmp_path / "folder", tmp_path / "fifo", Path("/dev/null")
    folder.mkdir()
    os.mkfifo(fifo)
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    more = {"convert": ["-O", "raw", tmp_path / "target"], "compare": [image]}.get(command, [])
    for path in (folder, fifo, device):
        refused(command, path, *more, kinds={ErrorKind.INVALID_FORMAT})
    for path in (tmp_path / "none", tmp_path / "image" / "below", tmp_path / ("n" * 300)):
        refused(command, path, *more, kinds={ErrorKind.NOT_FOUND, ErrorKind.IO, ErrorKind.INVALID_FORMAT})
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_targets_that_are_no_files(refused: Run, sample: Path, tmp_path: Path, kind: str) -> None:
    target = {"folder": tmp_path / "folder", "fifo": tmp_path / "fifo", "device": Path("/dev/null")}[kind]
    if kind == "folder":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    before = stat.S_IFMT(target.stat().st_mode)
    refused("convert", "-f", "raw", "-O", "raw", sample, target, kinds={ErrorKind.INVALID_FORMAT})
    refused("create", "-f", "qcow", "--force", target, "1M", kinds={ErrorKind.INVALID_FORMAT})
    assert stat.S_IFMT(target.stat().st_mode) == before


def _without_override() -> None:
    """Let file permissions count for root, too: drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH for what is started."""
    _limit()
    if os.geteuid() == 0:
        for capability in (1, 2):
            assert ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0


def test_no_permission(refused: Run, image: Path, tmp_path: Path, tapfs_process: Run) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(0o555)
    assert tapfs_process("info", image, preexec_fn=_without_override).code == 0
    line = refused("convert", "-O", "raw", image, folder / "b", kinds={ErrorKind.DENIED}, preexec_fn=_without_override)
    assert str(folder) in line
    image.chmod(0)
    line = refused("info", image, kinds={ErrorKind.DENIED}, preexec_fn=_without_override)
    assert str(image) in line


def test_an_image_in_use_names_the_process(refused: Run, tapfs_process: Run, image: Path, tmp_path: Path) -> None:
    script = (
        "import sys, tapfs\n"
        "with tapfs.open(sys.argv[1], format='qcow', writable=True):\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        line = refused("convert", "--no-sandbox", "-O", "raw", image, tmp_path / "b", kinds={ErrorKind.LOCKED})
        assert str(holder.pid) in line
        line = refused(
            "convert", "--no-sandbox", "-f", "qcow", "-O", "qcow", _copy_of(image), image, kinds={ErrorKind.LOCKED}
        )
        assert str(holder.pid) in line
        line = refused("repair", "--no-sandbox", image, kinds={ErrorKind.LOCKED})
        assert str(holder.pid) in line
        # A process in the sandbox may not look at others.
        assert "by another process;" in refused("repair", image, kinds={ErrorKind.LOCKED})
        assert tapfs_process("info", "--force-share", image).code == 0
    finally:
        holder.communicate()
    assert holder.returncode == 0
    assert tapfs_process("info", image).code == 0


def _copy_of(image: Path) -> Path:
    return Path(shutil.copy(image, image.with_name("copy")))


def test_sizes_that_cannot_be(refused: Run, tmp_path: Path) -> None:
    kinds = {ErrorKind.OUT_OF_BOUNDS, ErrorKind.NO_SPACE, ErrorKind.UNSUPPORTED, ErrorKind.INVALID_FORMAT}
    refused("create", "-f", "qcow", tmp_path / "a", str((1 << 63) - 1), kinds=kinds)
    refused("create", "-f", "raw", tmp_path / "a", str((1 << 63) - 1), kinds=kinds)
    assert os.listdir(tmp_path) == []
