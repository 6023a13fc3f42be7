"""A sample of the part `differential` of `make torture`: tapfs and QEMU read the same, or a rule says why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.peer.differential.__main__ import run
from tests.peer.differential.daemon import Daemon
from tests.peer.differential.mutations import Mutated, mutated
from tests.peer.differential.rules import rule_of
from tests.peer.differential.run import Sort, differences
from tests.peer.differential.seeds import FORMATS, seeds
from tests.peer.differential.sheets import sheets


@pytest.fixture(scope="module")
def daemon() -> Iterator[tuple[Path, Daemon]]:
    with TemporaryDirectory(prefix="tapfs-differential-") as folder:
        made = Daemon(Path(folder), None)
        yield Path(folder), made
        made.end()


@pytest.mark.parametrize("name", FORMATS)
def test_both_read_mutated_images_the_same(name: str, tmp_path: Path) -> None:
    run(name, range(8), None, tmp_path)


@pytest.mark.parametrize("name", ["vdi", "qed", "parallels", "vhdx"])
def test_both_read_sound_images_the_same(name: str, daemon: tuple[Path, Daemon]) -> None:
    folder, qemu = daemon
    for seed in seeds(name):
        assert differences(name, Mutated(seed, "sound", dict(seed.files)), folder, qemu) == []


def test_a_difference_that_no_rule_explains_is_found(
    daemon: tuple[Path, Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, qemu = daemon
    (seed, *_) = seeds("qed")
    read = qemu.read

    def changed(offset: int, length: int) -> bytes:
        return bytes(512) + read(offset, length)[512:]

    monkeypatch.setattr(qemu, "read", changed)
    found = differences("qed", Mutated(seed, "sound", dict(seed.files)), folder, qemu)
    assert [each.sort for each in found] == [Sort.BYTES]
    assert rule_of(found[0]) is None


def test_a_mutation_is_the_same_each_time() -> None:
    assert mutated("qed", 3) == mutated("qed", 3)


def test_the_sheets_have_every_rule() -> None:
    assert [path for path, text, made in sheets() if text != made] == [], "python -m tests.peer.differential.sheets"
