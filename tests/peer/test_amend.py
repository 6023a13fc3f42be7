"""`tapfs amend` beside QEMU: what it makes of an image is clean for qemu-img and reads the same."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def qemu(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


def facts(image: Path) -> dict[str, Any]:
    """What qemu-img says of an image that it finds clean."""
    qemu("qemu-img", "check", "-q", image)
    found: dict[str, Any] = json.loads(qemu("qemu-img", "info", "--output=json", image))["format-specific"]["data"]
    return found


@pytest.mark.parametrize("over_parent", [True, False])
@pytest.mark.usefixtures("each_qemu")
def test_an_image_goes_to_version_2_and_back(tapfs: Run, tmp_path: Path, *, over_parent: bool) -> None:
    parent, image, wanted = (tmp_path / name for name in ("parent.raw", "a.qcow2", "wanted.raw"))
    parent.write_bytes(random.Random(2).randbytes(300_000) + bytes((3 << 20) - 300_000))
    backing = ["-b", str(parent), "-F", "raw"] if over_parent else []
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *backing, image, "4M")
    writes = ["write -P 7 0 70000", "write -z 128k 128k", "write -P 9 1M 64k", "write -z 1M 64k"]
    qemu("qemu-io", "-f", "qcow2", *(word for each in writes for word in ("-c", each)), image)
    qemu("qemu-img", "convert", "-O", "raw", image, wanted)
    for option in ("compat=0.10", "compat=1.1", "compat=v2", "compat=v3"):
        assert tapfs("amend", "-o", option, image).code == 0
        assert facts(image)["compat"] == {"2": "0.10", "3": "1.1"}.get(option[-1], option.partition("=")[2])
        qemu("qemu-img", "compare", "-F", "qcow2", "-f", "raw", wanted, image)
    assert tapfs("amend", "-o", "lazy_refcounts=on,compression_type=zstd", image).code == 0
    found = facts(image)
    assert (found["lazy-refcounts"], found["compression-type"]) == (True, "zstd")
    qemu("qemu-img", "compare", "-F", "qcow2", "-f", "raw", wanted, image)
    assert tapfs("amend", "-o", "compat=0.10", image).code == 0
    assert facts(image)["compat"] == "0.10"
    qemu("qemu-img", "compare", "-F", "qcow2", "-f", "raw", wanted, image)


@pytest.mark.usefixtures("each_qemu")
def test_packed_by_zstd_has_no_version_2(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", image, "4M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -c -P 7 0 64k", image)
    before = image.read_bytes()
    refused = tapfs("amend", "-o", "compat=0.10", image)
    assert refused.code != 0
    assert "compress" in refused.err
    assert image.read_bytes() == before


@pytest.mark.usefixtures("each_qemu")
def test_snapshots_go_along_unless_they_have_zero_clusters(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", image)
    qemu("qemu-img", "snapshot", "-c", "one", image)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -z 0 64k", image)
    for option in ("compat=0.10", "compat=1.1"):
        assert tapfs("amend", "-o", option, image).code == 0
        facts(image)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -z 0 64k", image)
    qemu("qemu-img", "snapshot", "-c", "two", image)
    refused = tapfs("amend", "-o", "compat=0.10", image)
    assert (refused.code, "snapshot two has zero clusters" in refused.err) == (12, True)
    assert facts(image)["compat"] == "1.1"


@pytest.mark.usefixtures("each_qemu")
def test_refcounts_of_every_width(tapfs: Run, tmp_path: Path) -> None:
    image, wanted = tmp_path / "a.qcow2", tmp_path / "wanted.raw"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=16", image, "2M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 700k", "-c", "write -z 512k 64k", image)
    qemu("qemu-img", "snapshot", "-c", "one", image)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 8 300k 500k", image)
    qemu("qemu-img", "convert", "-O", "raw", image, wanted)
    refused = tapfs("amend", "-o", "refcount_bits=1", image)
    assert (refused.code, "2 references lead to cluster" in refused.err) == (12, True)
    for bits in (2, 64, 8, 32, 4, 1, 16):
        if bits == 1:
            qemu("qemu-img", "snapshot", "-d", "one", image)
        assert tapfs("amend", "-o", f"refcount_bits={bits}", image) == (0, "", "")
        assert facts(image)["refcount-bits"] == bits
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {bits} {bits}k 3k", "-c", f"write -P {bits} 1M {bits}k", image)
        qemu("qemu-io", "-f", "raw", "-c", f"write -P {bits} {bits}k 3k", "-c", f"write -P {bits} 1M {bits}k", wanted)
        qemu("qemu-img", "compare", "-F", "qcow2", "-f", "raw", wanted, image)
    assert image.stat().st_blocks * 512 < 2 << 20  # what is not used any more became holes
