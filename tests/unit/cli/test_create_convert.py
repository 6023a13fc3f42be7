"""create, convert, compare, info, map, check, repair and remove as an operator uses them, without a peer."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapfs.errors import CODES, ErrorKind

Run = Callable[..., Any]
DONE = (0, "", "")


def _entries(folder: Path) -> list[str]:
    """Everything in a folder, hidden names included."""
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("options", [(), ("-o", "blktap=on"), ("-c",)])
def test_there_and_back(tapfs: Run, sample: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    image, back = tmp_path / "a.qcow", tmp_path / "back.raw"
    assert tapfs("convert", "-f", "raw", "-O", "qcow", *options, sample, image) == DONE
    assert tapfs("check", "-q", image) == DONE
    assert tapfs("convert", "-f", "qcow", "-O", "raw", image, back) == DONE
    assert back.read_bytes() == sample.read_bytes()
    assert back.stat().st_blocks * 512 < sample.stat().st_size // 2
    assert image.stat().st_blocks * 512 < sample.stat().st_size // 2
    assert tapfs("compare", "-f", "raw", sample, image) == (0, "Images are identical.\n", "")
    assert _entries(tmp_path) == ["a.qcow", "back.raw"]


def test_compressed_is_smaller(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    assert tapfs("convert", "-O", "qcow", sample, plain) == DONE
    assert tapfs("convert", "-c", "-O", "qcow", sample, packed) == DONE
    assert packed.stat().st_size < plain.stat().st_size - 100_000


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4095, 4097, 65537])
def test_odd_sizes(tapfs: Run, tmp_path: Path, size: int) -> None:
    source, copy, image = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    source.write_bytes(bytes(range(1, 252)) * (size // 251) + b"z" * (size % 251))
    assert tapfs("convert", "-f", "raw", "-O", "raw", source, copy) == DONE
    assert copy.read_bytes() == source.read_bytes()
    if size > 0:
        for flags in ((), ("-c",)):
            assert tapfs("convert", *flags, "-f", "raw", "-O", "qcow", source, image) == DONE
            assert tapfs("compare", "-f", "raw", source, image).code == 0
            assert json.loads(tapfs("info", "--json", image).out)["virtual_size"] == max(-(-size // 512), 1) * 512


def test_an_overlay_holds_only_the_differences(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    changed = bytearray(sample.read_bytes())
    changed[5000:5010] = b"0123456789"
    changed[600 << 10 : 700 << 10] = bytes(100 << 10)
    changed[-1:] = b"!"
    source, overlay = tmp_path / "changed.raw", tmp_path / "overlay.qcow"
    source.write_bytes(changed)
    assert tapfs("convert", "-f", "raw", "-O", "qcow", "-b", sample, "-F", "raw", source, overlay) == DONE
    assert overlay.stat().st_size < 200 << 10
    assert tapfs("compare", "-f", "raw", source, "--second-backing-format", "raw", overlay).code == 0
    extents = json.loads(tapfs("map", "--json", "--backing-format", "raw", overlay).out)
    assert sum(extent["length"] for extent in extents if extent["depth"] == 0) < 120 << 10


def test_zeros_over_a_parent_that_has_data(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    empty, overlay = tmp_path / "empty.raw", tmp_path / "overlay.qcow"
    empty.touch()
    os.truncate(empty, sample.stat().st_size)
    assert tapfs("convert", "-f", "raw", "-O", "qcow", "-b", sample, "-F", "raw", empty, overlay) == DONE
    assert tapfs("compare", "-f", "raw", empty, "--second-backing-format", "raw", overlay).code == 0


def test_into_an_existing_disk_zeros_are_written_too(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    for format_name in ("raw", "qcow"):
        target = tmp_path / format_name
        noise = tmp_path / "noise"
        noise.write_bytes(b"n" * (5 << 20))
        assert tapfs("convert", "-f", "raw", "-O", format_name, noise, target) == DONE
        assert tapfs("convert", "-n", "-f", "raw", "-O", format_name, sample, target) == DONE
        assert tapfs("compare", "-f", "raw", "-F", format_name, sample, target).code == 0
        assert tapfs("compare", "-s", "-f", "raw", "-F", format_name, sample, target).code == 1


def test_an_existing_disk_that_is_too_small(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.write_bytes(b"n" * 4096)
    code, _, err = tapfs("convert", "-n", "-f", "raw", "-O", "raw", sample, target)
    assert code == CODES[ErrorKind.OUT_OF_BOUNDS].exit_code
    assert "4096" in err
    assert target.read_bytes() == b"n" * 4096


def test_the_target_is_replaced_but_never_the_source_itself(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.qcow"
    target.write_bytes(b"old")
    target.chmod(0o640)
    assert tapfs("convert", "-f", "raw", "-O", "qcow", sample, target) == DONE
    assert target.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link"
    link.symlink_to(target)
    overlay = tmp_path / "over.qcow"
    assert tapfs("create", "-f", "qcow", "-b", target, "-F", "qcow", overlay) == DONE
    before = target.read_bytes()
    for source, name in ((target, target), (target, link), (overlay, target)):
        for mode in ((), ("-n",)):
            ran = tapfs("convert", *mode, "-f", "qcow", "--backing-format", "qcow", "-O", "qcow", source, name)
            assert ran.code == CODES[ErrorKind.EXISTS].exit_code
    assert target.read_bytes() == before


def test_a_link_is_followed(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "a.raw")
    assert tapfs("convert", "-f", "raw", "-O", "raw", sample, link) == DONE
    assert link.is_symlink()
    assert (tmp_path / "real" / "a.raw").read_bytes() == sample.read_bytes()


def test_encrypted_there_and_back(tapfs: Run, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, image, back = tmp_path / "key", tmp_path / "a.qcow", tmp_path / "back.raw"
    key.write_text("secret\nrest\n")
    assert tapfs("convert", "-f", "raw", "-O", "qcow", "--encrypt", "--target-key-file", key, sample, image) == DONE
    assert b"line 000001" not in image.read_bytes()
    assert tapfs("convert", "--key-file", key, "-O", "raw", image, back) == DONE
    assert back.read_bytes() == sample.read_bytes()
    monkeypatch.setenv("TAPFS_PASSWORD", "secret")
    assert tapfs("compare", "-f", "raw", sample, image).code == 0
    monkeypatch.setenv("TAPFS_PASSWORD", "wrong")
    assert tapfs("compare", "-f", "raw", sample, image).code == 1


def test_what_needs_no_password_asks_for_none(tapfs_process: Run, tmp_path: Path) -> None:
    key, image = tmp_path / "key", tmp_path / "a.qcow"
    key.write_text("secret\n")
    assert tapfs_process("create", "-f", "qcow", "--encrypt", "--key-file", key, image, "1M") == DONE
    assert json.loads(tapfs_process("info", "--json", image).out)["encrypted"] is True
    assert tapfs_process("map", "--json", image).code == 0
    assert tapfs_process("check", "-q", image) == DONE
    code, _, err = tapfs_process("convert", "-O", "raw", image, tmp_path / "b")
    assert code == CODES[ErrorKind.DENIED].exit_code
    assert len(err.splitlines()) == 1
    assert "--key-file" in err
    assert "TAPFS_PASSWORD" in err
    assert _entries(tmp_path) == ["a.qcow", "key"]


def test_compressed_and_encrypted_is_refused(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    words = ("convert", "-c", "--encrypt", "--target-key-file", key, "-f", "raw", "-O", "qcow", sample, tmp_path / "a")
    assert tapfs(*words).code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert _entries(tmp_path) == ["key"]


def test_raw_cannot_be_compressed(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    ran = tapfs("convert", "-c", "-f", "raw", "-O", "raw", sample, tmp_path / "a")
    assert ran.code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert _entries(tmp_path) == []


@pytest.mark.parametrize("words", [("nosuch",), ("ram",)])
def test_target_formats_that_cannot_be(tapfs: Run, sample: Path, tmp_path: Path, words: tuple[str]) -> None:
    ran = tapfs("convert", "-f", "raw", "-O", *words, sample, tmp_path / "a")
    assert ran.code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert len(ran.err.splitlines()) == 1
    assert _entries(tmp_path) == []


def test_create_refuses_to_replace_data_unless_forced(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a"
    image.write_bytes(b"precious")
    code, _, err = tapfs("create", "-f", "raw", image, "1M")
    assert code == CODES[ErrorKind.EXISTS].exit_code
    assert "--force" in err
    assert image.read_bytes() == b"precious"
    assert tapfs("create", "-f", "raw", "--force", image, "1M") == DONE
    assert image.stat().st_size == 1 << 20
    empty = tmp_path / "empty"
    empty.touch()
    assert tapfs("create", "-f", "raw", empty, "1K") == DONE
    assert _entries(tmp_path) == ["a", "empty"]


def test_an_overlay_takes_its_parents_size(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    assert tapfs("create", "-f", "qcow", "-b", sample, "-F", "raw", image) == DONE
    info = json.loads(tapfs("info", "--json", "--backing-format", "raw", image).out)
    assert info["virtual_size"] == sample.stat().st_size
    assert info["backing"]["name"] == str(sample)
    assert [link["path"] for link in info["chain"]] == [str(image), str(sample)]
    assert tapfs("compare", "--backing-format", "raw", image, "-F", "raw", sample).code == 0


def test_a_missing_parent_of_a_new_image(tapfs: Run, tmp_path: Path) -> None:
    ran = tapfs("create", "-f", "qcow", "-b", "none.raw", "-F", "raw", tmp_path / "a.qcow", "1M")
    assert ran.code == CODES[ErrorKind.NOT_FOUND].exit_code
    assert _entries(tmp_path) == []


def test_options_are_listed_and_unknown_ones_refused(tapfs: Run, tmp_path: Path) -> None:
    code, out, _ = tapfs("create", "-f", "qcow", "-o", "help")
    assert code == 0
    assert "blktap" in out
    assert tapfs("convert", "-O", "qcow", "-o", "help").out == out
    ran = tapfs("create", "-f", "qcow", "-o", "nonsense=1", tmp_path / "a", "1M")
    assert ran.code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert "nonsense" in ran.err
    assert _entries(tmp_path) == []


def test_a_ram_disk_from_an_image_and_back(tapfs: Run, sample: Path, tmp_path: Path, ram_name: str) -> None:
    assert tapfs("convert", "-f", "raw", "-O", "ram", sample, ram_name) == DONE
    assert tapfs("compare", "-s", "-f", "raw", sample, ram_name).code == 0
    assert tapfs("convert", "-O", "qcow", ram_name, tmp_path / "saved.qcow") == DONE
    assert tapfs("compare", "-f", "raw", sample, tmp_path / "saved.qcow").code == 0
    assert tapfs("create", "-f", "ram", ram_name, "1M").code == CODES[ErrorKind.EXISTS].exit_code
    assert tapfs("remove", ram_name) == DONE
    assert tapfs("remove", ram_name).code == CODES[ErrorKind.NOT_FOUND].exit_code
    assert tapfs("info", ram_name).code == CODES[ErrorKind.NOT_FOUND].exit_code


def test_compare_says_where(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    content = bytearray(sample.read_bytes())
    other = tmp_path / "b"
    for offset in (0, 511, 524288, 600000, 2097151, 2097152, len(content) - 1):
        changed = bytearray(content)
        changed[offset] ^= 1
        other.write_bytes(changed)
        ran = tapfs("compare", "-f", "raw", "-F", "raw", sample, other)
        assert ran == (1, f"Content differs, first at byte {offset} ({offset:#x}).\n", "")
        ran = tapfs("compare", "--json", "-f", "raw", "-F", "raw", sample, other)
        assert json.loads(ran.out) == {"version": 1, "same": False, "offset": offset, "sizes": [len(content)] * 2}
        assert tapfs("compare", "-q", "-f", "raw", "-F", "raw", sample, other) == (1, "", "")


def test_compare_of_different_sizes(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    content = sample.read_bytes()
    other = tmp_path / "b"
    other.write_bytes(content + bytes(3 << 20))
    for pair in ((sample, other), (other, sample)):
        assert tapfs("compare", "-f", "raw", "-F", "raw", *pair).code == 0
        assert tapfs("compare", "-s", "-f", "raw", "-F", "raw", *pair).code == 1
    other.write_bytes(content + bytes(1 << 20) + b"x")
    for pair in ((sample, other), (other, sample)):
        ran = tapfs("compare", "-f", "raw", "-F", "raw", *pair)
        assert ran.code == 1
        assert str(len(content) + (1 << 20)) in ran.out


def test_map_in_both_dresses(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    assert tapfs("convert", "-f", "raw", "-O", "qcow", sample, image) == DONE
    extents = json.loads(tapfs("map", "--json", image).out)
    assert extents[0]["start"] == 0
    for left, right in itertools.pairwise(extents):
        assert left["start"] + left["length"] == right["start"]
    assert extents[-1]["start"] + extents[-1]["length"] == sample.stat().st_size
    lines = tapfs("map", image).out.splitlines()[1:]
    data = [extent for extent in extents if extent["data"]]
    assert [tuple(int(word, 16) for word in line.split()[:3]) for line in lines] == [
        (extent["start"], extent["length"], extent["offset"]) for extent in data
    ]
    part = json.loads(tapfs("map", "--json", "-s", "4K", "-l", "8K", image).out)
    assert part[0]["start"] == 4096
    assert part[-1]["start"] + part[-1]["length"] == 12288
    assert tapfs("map", "--json", "-s", "1T", image).out == "[]\n"


def test_info_for_people(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    assert tapfs("create", "-f", "qcow", "-b", sample, "-F", "raw", image) == DONE
    code, out, _ = tapfs("info", "--backing-format", "raw", image)
    assert code == 0
    rows = dict(line.split(":", 1) for line in out.splitlines())
    assert rows["format"].strip() == "qcow"
    assert rows["virtual size"].strip() == f"3 MiB ({sample.stat().st_size} bytes)"
    assert str(sample) in rows["backing"]
    columns = {len(line) - len(line.split(":", 1)[1].lstrip()) for line in out.splitlines() if line[0] != " "}
    assert len(columns) == 1


def test_names_with_odd_characters(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a\n\x1b[31m\udcff.raw"
    image.write_bytes(bytes(512))
    code, out, err = tapfs("info", "-f", "raw", image)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    ran = tapfs("info", "-f", "qcow", image)
    assert ran.code == CODES[ErrorKind.INVALID_FORMAT].exit_code
    assert len(ran.err.splitlines()) == 1
    assert "\x1b" not in ran.err


def test_check_reports_corruption_and_leaks(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    assert tapfs("convert", "-f", "raw", "-O", "qcow", sample, image) == DONE
    with image.open("ab") as file:
        file.write(b"leak" * 4096)
    ran = tapfs("check", image)
    assert ran.code == 3
    assert "leak" in ran.out
    report = json.loads(tapfs("check", "--json", image).out)
    assert (report["corruptions"], report["leaks"] > 0) == (0, True)
    content = bytearray(image.read_bytes())
    content[0x30:0x38] = (1 << 50).to_bytes(8, "big")  # the first L1 entry points far outside
    image.write_bytes(content)
    ran = tapfs("check", image)
    assert ran.code == 2
    assert "corruption" in ran.out
    assert ran.err == ""


def test_a_dry_repair_changes_nothing_and_a_repair_mends(
    tapfs: Run, blktap_images: dict[str, Any], tmp_path: Path
) -> None:
    fixture = blktap_images["standalone-2007-le-l1"]
    image = tmp_path / "a.qcow"
    content = fixture.path.read_bytes()
    image.write_bytes(content)
    dry = tapfs("repair", "-n", image)
    assert dry.code == 0
    assert "stage 1: write" in dry.out
    assert json.loads(tapfs("repair", "-n", "--json", image).out)["stages"]
    assert image.read_bytes() == content
    assert tapfs("repair", image).code == 0
    assert image.read_bytes() != content
    assert "nothing to repair" in tapfs("repair", "-n", image).out
    assert tapfs("compare", image, fixture.path).code == 0


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk that takes a while to compress. Not to be changed."""
    path = tmp_path_factory.mktemp("noise") / "noise.raw"
    with path.open("wb") as file:
        for _ in range(96):
            file.write(os.urandom(1 << 20))
    return path


def _wait_until_it_writes(process: subprocess.Popen[bytes]) -> None:
    """Until the process has read a good part of its source."""
    while process.poll() is None:
        counters = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        if int(counters["wchar"]) > 8 << 20:
            return
        time.sleep(0.005)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_an_interrupted_convert_leaves_what_was_there(
    tapfs_command: list[str], noise: Path, tmp_path: Path, number: signal.Signals, code: int, *, existing: bool
) -> None:
    target = tmp_path / "a.qcow"
    if existing:
        target.write_bytes(b"what was there")
    words = [*tapfs_command, "convert", "-c", "-f", "raw", "-O", "qcow", str(noise), str(target)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    _wait_until_it_writes(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == b""
    assert len(err.splitlines()) == (0 if number == signal.SIGKILL else 1)
    assert _entries(tmp_path) == (["a.qcow"] if existing else [])
    if existing:
        assert target.read_bytes() == b"what was there"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("words", [("-O", "raw"), ("-O", "qcow"), ("-c", "-O", "qcow")])
def test_a_convert_that_meets_a_limit_leaves_what_was_there(
    tapfs_process: Run, sample: Path, tmp_path: Path, words: tuple[str, ...], *, existing: bool
) -> None:
    target = tmp_path / "a"
    if existing:
        target.write_bytes(b"what was there")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    ran = tapfs_process("convert", "-f", "raw", *words, sample, target, preexec_fn=limit)
    assert ran.code == CODES[ErrorKind.NO_SPACE].exit_code
    assert os.strerror(errno.EFBIG) in ran.err
    assert len(ran.err.splitlines()) == 1
    assert _entries(tmp_path) == (["a"] if existing else [])
    if existing:
        assert target.read_bytes() == b"what was there"


def test_formats_by_default_are_those_of_qemu_img(tapfs: Run, tmp_path: Path) -> None:
    image, copy = tmp_path / "a", tmp_path / "b"
    assert tapfs("create", "-q", image, "1M") == DONE
    assert image.stat().st_size == 1 << 20
    assert tapfs("convert", image, copy) == DONE
    assert copy.read_bytes() == image.read_bytes()
    ran = tapfs("convert", image, tmp_path / "c.qcow")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == f"tapfs: {tmp_path}/c.qcow becomes a raw image; -O qcow makes a qcow image\n"
    ran = tapfs("convert", tmp_path / "c.qcow")
    assert (ran.code, ran.out) == (64, "")
    assert ran.err.startswith("tapfs: error: SOURCE and TARGET are needed")  # nothing was to become raw


def test_names_of_formats_in_capitals(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    image, overlay = tmp_path / "a", tmp_path / "b"
    assert tapfs("convert", "-f", "RAW", "-O", "Qcow", sample, image) == DONE
    assert tapfs("create", "-f", "QCOW", "-b", image, "-F", "QCOW", overlay) == DONE
    assert tapfs("compare", "-f", "RAW", sample, "-F", "QCOW", "--second-backing-format", "QCOW", overlay).code == 0
    assert tapfs("info", "-f", "QCOW", "--backing-format", "QCOW", overlay).code == 0


def test_sizes_in_options_of_a_format(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a"
    assert tapfs("create", "-f", "qcow", "-o", "cluster_size=64K", image, "1GiB") == DONE
    assert json.loads(tapfs("info", "--output=json", image).out)["details"]["cluster_size"] == 65536
    assert tapfs("info", "--output", "human", image).out == tapfs("info", image).out
