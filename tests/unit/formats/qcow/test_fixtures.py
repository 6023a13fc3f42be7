"""Images of the original blktap tools are read right, checked, named and repaired."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tapfs.driver import OpenRequest, Severity
from tapfs.formats.qcow import FORMAT
from tapfs.testing.model import MemoryFile, read_extents
from tests.qcow_images import write_to

if TYPE_CHECKING:
    from tests.conftest import Fixture

NAMES = [
    "standalone-2007-le-l1",
    "standalone-2008-be-l1-noflag",
    "sparse-2007-le-l1",
    "overlay-2007-le-l1",
    "overlay-2006-12byte-ext",
    "empty-2007-sparse",
    "empty-2007-reserved",
    "empty-2010-oversized-l1",
]

ERAS = {
    "standalone-2007-le-l1": "2006-07 to 2008-03",
    "standalone-2008-be-l1-noflag": "2008-03 to 2010-05",
    "overlay-2006-12byte-ext": "2006-07 to 2006-12",
    "empty-2010-oversized-l1": "Xen 4.0 to 4.4",
    "empty-2007-sparse": "before 2010-05",
}


def loaded(fixture: Fixture) -> tuple[MemoryFile, bytes]:
    backing = fixture.backing.read_bytes() if fixture.backing else b""
    return MemoryFile(fixture.path.read_bytes(), str(fixture.path)), backing


def guest_sha256(file: MemoryFile, backing: bytes) -> str:
    driver = FORMAT.open(file, OpenRequest())
    return hashlib.sha256(read_extents(driver, file, 0, driver.geometry.virtual_size, backing)).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_the_guest_wrote(name: str, blktap_images: dict[str, Fixture]) -> None:
    assert guest_sha256(*loaded(blktap_images[name])) == blktap_images[name].guest_sha256


def test_every_fixture_is_named_here(blktap_images: dict[str, Fixture]) -> None:
    assert sorted(blktap_images) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_checks_clean_and_names_the_era(name: str, blktap_images: dict[str, Fixture]) -> None:
    file, _ = loaded(blktap_images[name])
    driver = FORMAT.open(file, OpenRequest(lenient=True))
    report = driver.check()
    assert (report.corruptions, report.leaks) == (0, 0)
    notes = [finding.message for finding in report.findings if finding.severity is Severity.NOTE]
    assert notes[0].startswith("the layout is that of blktap, ") or "Xen 4.0" in notes[0]
    assert ERAS.get(name, "blktap") in notes[0]
    assert any("QEMU reads other data" in note for note in notes) == ("le-l1" in name)
    json.dumps(driver.details())


def test_details_say_what_was_found(blktap_images: dict[str, Fixture]) -> None:
    def details(name: str) -> dict[str, object]:
        return dict(FORMAT.open(loaded(blktap_images[name])[0], OpenRequest()).details())

    live = details("sparse-2007-le-l1")
    assert (live["fast_path"], live["l1_byte_order"], live["layout"]) == (True, "little", "blktap")
    overlay = details("overlay-2006-12byte-ext")
    assert overlay["extended_header"]["length"] == 12  # type: ignore[index]
    assert overlay["backing_mtime"] == 0x6B02BCC4
    oversized = details("empty-2010-oversized-l1")
    assert (oversized["oversized_l1"], oversized["fast_path"]) == (True, False)


def by_qemu(image: Path, backing: Path | None, raw: Path) -> bytes:
    file = {"driver": "file", "filename": str(image)}
    node: dict[str, object] = {"driver": "qcow", "file": file}
    if backing is not None:
        node["backing"] = {"driver": "raw", "file": {"driver": "file", "filename": str(backing)}}
    subprocess.run(["qemu-img", "convert", "-O", "raw", "json:" + json.dumps(node), raw], check=True)
    return raw.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_repaired_image_is_right_for_everyone(name: str, blktap_images: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = blktap_images[name]
    file, backing = loaded(fixture)
    plans = FORMAT.open(file, OpenRequest(lenient=True)).repair()
    assert plans
    file.apply_all(list(plans))
    assert guest_sha256(file, backing) == fixture.guest_sha256
    again = FORMAT.open(file, OpenRequest(lenient=True))
    report = again.check()
    assert (report.corruptions, report.leaks) == (0, 0)
    assert not again.repair()
    details = again.details()
    assert (details["era"], details["l1_byte_order"]) == ("blktap, 2010-05 to 2014", "big")
    assert details["extended_header"]["cksum_valid"]  # type: ignore[index]
    seen = by_qemu(write_to(file, tmp_path / "repaired.qcow"), fixture.backing, tmp_path / "guest.raw")
    assert hashlib.sha256(seen).hexdigest() == fixture.guest_sha256
