"""A sample of the damages of `make torture`: `tapfs check` and `qemu-img check` agree, or it is known why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.peer.qcow2_damage.case import Case, damaged, judge
from tests.peer.qcow2_damage.checkers import Word
from tests.peer.qcow2_damage.disagreements import KNOWN
from tests.peer.qcow2_damage.sound import IMAGE, sound

#: Each kind of image with damages that once made the two disagree, or made a repair lose data.
CASES = {
    "4096": (
        "refcount table leads to an L2 table",
        "header's refcount table leads to an L2 table",
        "L1 leads to the snapshots",
        "snapshot's L1 leads to the L1 table",
        "L1: bit 56",
        "bitmap's table: bit 8",
        "bitmap: flags that are reserved",
        "bitmap directory: much longer",
        "compressed: the bit of sole ownership",
        "data twice",
        "header: a raw data file, without one",
    ),
    "subclusters": (
        "refcount table leads to another's data",
        "data: the bit of sole ownership",
        "subclusters: allocated and zero",
        "snapshot's data leads to the L1 table",
        "placed zero leads to outside",
    ),
    "packed subclusters": ("header: an L1 table that goes on",),
    "version 2": ("data: the lowest bit", "cut in an L2 table"),
    "512": ("refcount table: bit 1", "L2 table counted: no references", "an L2 table twice"),
    "data file": ("data leads to outside", "data: the bit of sole ownership"),
    "1 bit": ("data counted: no references",),
    "64 bits": ("a second refcount block over an L2 table", "snapshots counted: one more"),
    "LUKS": ("encryption leads to outside",),
    "overlay": ("header's snapshots leads to at the end",),
}


@pytest.mark.parametrize(("kind", "damage"), [(kind, each) for kind, damages in CASES.items() for each in damages])
def test_both_say_the_same_and_a_repair_loses_nothing(tmp_path: Path, kind: str, damage: str) -> None:
    case = Case(kind, damage)
    image = damaged(case)
    assert image is not None
    judge(case, image, tmp_path, None)


def test_a_sound_image_is_clean_to_both(tmp_path: Path) -> None:
    outcome = judge(Case("4096", "none"), sound("4096")[IMAGE], tmp_path, None)
    assert outcome.mended


def test_the_sheet_has_every_disagreement() -> None:
    sheet = (REPOSITORY / "docs/specs/qcow2.md").read_text(encoding="utf-8")
    assert [each.why for each in KNOWN if f"| {each.why}" not in sheet] == []
    assert all(each.ours is not Word.REFUSED for each in KNOWN)
