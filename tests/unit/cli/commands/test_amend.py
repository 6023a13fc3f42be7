"""`tapfs amend`: what it refuses, in words, and that nothing is changed then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("create", "option", "said"),
    [
        ((), "cluster_size=4K", "cluster_size of an image that is there cannot be changed"),
        ((), "refcount_bits=3", "must be one of 1, 2, 4, 8, 16, 32, 64"),
        (("-o", "compat=0.10"), "refcount_bits=8", "need compat=1.1"),
        ((), "backing_file=x", "tapfs rebase -u -b FILE"),
        ((), "compat=0.9", "must be one of 0.10, v2, 1.1, v3"),
        ((), "nonsense=1", "unknown option 'nonsense'"),
        ((), "compat=0.10,lazy_refcounts=on", "need compat=1.1"),
        ((), "data_file=x", "the image has none"),
        (("-o", "extended_l2=on"), "compat=0.10", "has subclusters, which version 2 does not have"),
        (("-o", "refcount_bits=8"), "compat=0.10", "reference counts of 8 bits"),
        (("-o", "data_file=d"), "data_file_raw=on", "not known to be zeros"),
    ],
)
def test_what_cannot_be_is_refused(create: tuple[str, ...], option: str, said: str, tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    assert tapfs("create", "-f", "qcow2", *create, image, "1M").code == 0
    before = image.read_bytes()
    refused = tapfs("amend", "-o", option, image)
    assert refused.code == 12
    assert said in refused.err
    assert image.read_bytes() == before


def test_compressed_clusters_keep_their_type(tapfs: Run, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"x" * 65536)
    assert tapfs("convert", "-c", "-O", "qcow2", "-f", "raw", tmp_path / "a.raw", tmp_path / "a.qcow2").code == 0
    assert "the disk has compressed clusters" in tapfs("amend", "-o", "compression_type=zstd", tmp_path / "a.qcow2").err


def test_the_remedy_for_compressed_clusters_leads_to_the_version_that_was_wanted(tapfs: Run, tmp_path: Path) -> None:
    """`compression_type` needs version 3, so it makes no image of version 2."""
    (tmp_path / "a.raw").write_bytes(b"x" * 65536)
    words = ("-c", "-O", "qcow2", "-o", "compression_type=zstd", "-f", "raw", tmp_path / "a.raw", tmp_path / "a.qcow2")
    assert tapfs("convert", *words).code == 0
    for option in ("compat=0.10", "compression_type=zlib"):
        said = tapfs("amend", "-o", option, tmp_path / "a.qcow2").err
        assert "the disk has compressed clusters" in said
        remedy = f"tapfs convert -c -O qcow2 -o {option.replace('zlib', '…')}"
        assert remedy in said
    new = ("-c", "-O", "qcow2", "-o", "compat=0.10", tmp_path / "a.qcow2", tmp_path / "b.qcow2")
    assert tapfs("convert", *new).code == 0


def test_bitmaps_keep_version_3_and_data_files_get_other_names(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    assert tapfs("create", "-f", "qcow2", "-o", "data_file=d,data_file_raw=on", image, "1M").code == 0
    assert tapfs("amend", "-o", "data_file=e,data_file_raw=off", image).code == 0
    (tmp_path / "d").rename(tmp_path / "e")
    assert tapfs("check", image).code == 0
    assert tapfs("create", "--force", "-f", "qcow2", image, "1M").code == 0
    assert tapfs("bitmap", "--add", image, "one").code == 0
    assert "has bitmaps" in tapfs("amend", "-o", "compat=0.10", image).err
    assert tapfs("amend", "-o", "lazy_refcounts=on", image).code == 0
    assert "one" in tapfs("bitmap", image).out


def test_other_formats_and_empty_words_are_refused(tapfs: Run, tmp_path: Path) -> None:
    assert tapfs("create", "-f", "vdi", tmp_path / "a.vdi", "1M").code == 0
    assert (
        "a vdi image has no options that could be amended" in tapfs("amend", "-o", "compat=1.1", tmp_path / "a.vdi").err
    )
    assert "-o is missing" in tapfs("amend", tmp_path / "a.vdi").err
    assert "tapfs resize" in tapfs("amend", "-o", "size=1G", tmp_path / "a.vdi").err
    assert "compression_type" in tapfs("amend", "-f", "qcow2", "-o", "help").out
    assert "nothing can be amended in vdi" in tapfs("amend", "-f", "vdi", "-o", "help").out
