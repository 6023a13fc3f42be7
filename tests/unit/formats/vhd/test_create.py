"""Creating VHDs: sizes, options, limits, and what stands in the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tests.conftest import Ran
from tests.vhd_images import summed

Run = Callable[..., Ran]
DONE = (0, "", "")


def size_of(path: Path) -> int:
    with tapfs_package.open(path) as disk:
        return disk.size


@pytest.mark.parametrize(
    ("options", "asked", "size"),
    [
        ((), "10M", 10 << 20),
        ((), "1000", 1024),
        (("subformat=dynamic",), "10M", 10 << 20),
        (("subformat=fixed",), "10M", 10 << 20),
        (("force_size=on",), "10M", 10 << 20),
        (("force_size=off",), "10M", 10514432),
        (("force_size=off", "subformat=fixed"), "5M", 5257216),
        (("force_size=off",), "200G", 200 << 30),
        (("azure=on",), "10M", 10 << 20),
        (("azure=on",), "10241K", 11 << 20),
        ((), "2040G", 2040 << 30),
    ],
)
def test_sizes(tapfs: Run, tmp_path: Path, options: tuple[str, ...], asked: str, size: int) -> None:
    path = tmp_path / "a.vhd"
    words = [word for option in options for word in ("-o", option)]
    assert tapfs("create", "-f", "vhd", *words, path, asked) == DONE
    assert size_of(path) == size
    raw = path.read_bytes()[-512:]
    assert raw == summed(raw, 64)
    fixed = any(option in {"subformat=fixed", "azure=on"} for option in options)
    assert path.stat().st_size == size + 512 if fixed else path.stat().st_size < 5 << 20
    assert tapfs("check", "-q", path).code == 0


def test_vpc_is_the_same_format(tapfs: Run, tmp_path: Path) -> None:
    assert tapfs("create", "-f", "vpc", tmp_path / "a", "1M") == DONE
    with tapfs_package.open(tmp_path / "a", format="vpc") as disk:
        assert disk.format_name == "vhd"


@pytest.mark.parametrize(
    ("options", "asked", "code", "said"),
    [
        ((), "2041G", 13, "2040 GiB"),
        (("subformat=fixed",), "2041G", 13, "2040 GiB"),
        ((), "0", 13, "cannot make a VHD of 0 bytes"),
        (("subformat=sparse",), "1M", 12, "must be fixed or dynamic"),
        (("azure=on", "subformat=dynamic"), "1M", 12, "fixed images only"),
        (("azure=on", "force_size=off"), "1M", 12, "exclude each other"),
        (("azure=maybe",), "1M", 12, "must be on or off"),
        (("block_size=1000",), "1M", 12, "power of two"),
        (("block_size=0",), "1M", 12, "power of two"),
        (("block_size=4096", "subformat=fixed"), "1M", 12, "images that grow only"),
        (("preallocation=falloc",), "1M", 12, "fixed images only"),
        (("preallocation=some", "subformat=fixed"), "1M", 12, "must be off, falloc or full"),
        (("block_size=4096",), "2040G", 13, "too small"),
        (("cluster_size=4096",), "1M", 12, "unknown option 'cluster_size' for vhd"),
    ],
)
def test_refusals_leave_no_file(
    tapfs: Run, tmp_path: Path, options: tuple[str, ...], asked: str, code: int, said: str
) -> None:
    words = [word for option in options for word in ("-o", option)]
    ended, _, err = tapfs("create", "-f", "vhd", *words, tmp_path / "a.vhd", asked)
    assert ended == code
    assert said in err
    assert os.listdir(tmp_path) == []


def test_every_image_has_a_uuid_of_its_own(tapfs: Run, tmp_path: Path) -> None:
    found = set[bytes]()
    for name in ("a", "b", "c"):
        assert tapfs("create", "-f", "vhd", tmp_path / name, "1M") == DONE
        found.add((tmp_path / name).read_bytes()[68:84])
    assert len(found) == 3
    assert bytes(16) not in found


def test_a_file_without_holes(tapfs: Run, tmp_path: Path) -> None:
    """Windows refuses an image whose file has holes."""
    source, path = tmp_path / "source", tmp_path / "a.vhd"
    source.write_bytes(bytes(1 << 20) + b"x" * 512 + bytes(1 << 20))
    words = ("convert", "-f", "raw", "-O", "vhd", "-o", "subformat=fixed", "-o", "preallocation=falloc", source, path)
    assert tapfs(*words) == DONE
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert path.read_bytes()[:-512] == source.read_bytes()


def test_a_fixed_vhd_keeps_its_footer_at_the_end(tapfs: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    assert tapfs("create", "-f", "vhd", "-o", "subformat=fixed", path, "1M") == DONE
    for size in ("2M", "1536K", "3M"):
        assert tapfs("resize", "--shrink", path, size).code == 0
        wanted = {"2M": 2 << 20, "1536K": 3 << 19, "3M": 3 << 20}[size]
        assert size_of(path) == wanted
        assert path.stat().st_size == wanted + 512
        assert path.read_bytes()[:-512] == bytes(wanted)
        assert tapfs("check", path).code == 0


def test_a_new_image_takes_what_is_written(tapfs: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000) + bytes(6_000_000) + os.urandom(100_000 - 128))
    for number, options in enumerate(((), ("subformat=fixed",), ("block_size=65536",))):
        target = tmp_path / f"{number}.vhd"
        words = [word for option in options for word in ("-o", option)]
        assert tapfs("convert", "-f", "raw", "-O", "vhd", *words, source, target) == DONE
        assert tapfs("compare", "-f", "raw", source, target).code == 0
        assert tapfs("check", "-q", target).code == 0
