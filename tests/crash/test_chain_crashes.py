"""Power fails while an overlay is committed or rebased: its disk is the same at every moment."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import tapfs
from tapfs.jobs import commit
from tests.crash import chains
from tests.crash.chains import CHAINS, SIZE, content, crash_everywhere, scribble


@pytest.mark.parametrize("kind", CHAINS)
def test_a_crash_in_a_commit_leaves_the_overlay_s_disk_as_it_was(tmp_path: Path, kind: str) -> None:
    assert chains.commit(tmp_path, kind, kind)


@pytest.mark.parametrize("kind", CHAINS)
def test_a_crash_in_a_rebase_leaves_the_disk_as_it_was(tmp_path: Path, kind: str) -> None:
    assert chains.rebase(tmp_path, kind, kind)


def test_a_crash_in_a_rebase_that_packs_leaves_the_disk_as_it_was(tmp_path: Path) -> None:
    base, over, other = (tmp_path / name for name in ("base.img", "over.img", "other.img"))
    for path, letters in ((base, b"abc"), (other, b"xyz")):
        path.write_bytes(b"".join(bytes([letter]) * (SIZE // 3) for letter in letters).ljust(SIZE, b"\0"))
    over_options = {"cluster_size": "4096", "refcount_bits": "8"}
    tapfs.create(over, "qcow2", SIZE, backing="base.img", backing_format="raw", options=over_options)
    scribble(over, "qcow2", "raw", random.Random(8), 25)
    before = content(over, "qcow2", ["raw"])
    packed = 0

    def look(number: int) -> None:
        nonlocal packed
        assert content(over, "qcow2", ["raw"]) == before, number
        assert not tapfs.check(over, format="qcow2").corruptions, number
        with tapfs.open(over, backing_formats=["raw"]) as disk:
            packed = max(packed, sum(extent.compressed for extent in disk.extents()))

    words = ["rebase", "-c", "-q", "-f", "qcow2", "--backing-format", "raw", "-b", "other.img", "-F", "raw", str(over)]
    crash_everywhere(tmp_path, words, [over], look, "packed")
    assert packed


def test_a_commit_that_empties_before_the_base_is_durable_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that `tapfs.jobs.commit` keeps, turned round: the crash test above must see it."""
    source = Path(commit.__file__).read_text()
    assert source.index("lower.end_writing()") < source.index("upper.uncover(")
    wrong = tmp_path / "sitecustomize.py"
    wrong.write_text(
        "from tapfs.disk.image import Image\n"
        "right = Image.end_writing\n"
        "def later(image):\n"
        "    if image.path.endswith('over.img'):\n"
        "        right(image)\n"
        "Image.end_writing = later\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AssertionError):
        chains.commit(tmp_path, "qcow2 over qcow2", "qcow2 over qcow2")
