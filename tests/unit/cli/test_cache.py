"""`--cache SIZE` and `cache_bytes=`: the maps of an image take no more memory than that, whatever is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs.cli.mount_options import words_for
from tapfs.disk.image import Image
from tests.conftest import Ran
from tests.scattered_images import scattered_qcow

SIZE = 16 << 20
BOUND = 64 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """256 map units, of which each takes more than half a KiB."""
    path = tmp_path / "a.qcow"
    scattered_qcow(path, SIZE, 12000, cluster_bits=9)
    return path


def bytes_after_reading(disk: Image) -> int:
    for offset in range(0, SIZE, 32768):
        disk.read(offset, 512)
    return disk.statistics().cache_bytes


def test_the_bound_of_an_image_is_what_was_said(image: Path) -> None:
    with tapfs.open(image) as disk:
        assert bytes_after_reading(disk) > 2 * BOUND
    with tapfs.open(image, cache_bytes=BOUND) as disk:
        assert bytes_after_reading(disk) <= BOUND
    with pytest.raises(ValueError, match="cache_bytes"):
        tapfs.open(image, cache_bytes=-1)


@pytest.mark.parametrize("size", ["0", "64K", "1G"])
def test_commands_give_the_same_with_any_bound(
    tapfs: Callable[..., Ran], image: Path, tmp_path: Path, size: str
) -> None:
    assert tapfs("map", "--json", "--cache", size, image).out == tapfs("map", "--json", image).out
    assert tapfs("check", "--cache", size, image).code == 0
    assert tapfs("convert", "--cache", size, "-O", "qcow", image, tmp_path / "b.qcow").code == 0
    assert tapfs("compare", "--cache", size, image, tmp_path / "b.qcow").code == 0


def test_a_bound_that_is_no_size_is_refused(tapfs: Callable[..., Ran], image: Path) -> None:
    done = tapfs("map", "--cache", "much", image)
    assert (done.code, done.out) == (64, "")
    assert "not a size" in done.err


def test_a_line_of_fstab_has_it_too() -> None:
    assert words_for("ro,cache=8M", "p") == ["--cache=8M"]
