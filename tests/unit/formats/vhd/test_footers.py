"""The footers of a VHD: which one counts, what is said of the others, and which images are not written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tapfs.driver import OpenRequest, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vhd import FORMAT
from tapfs.testing.model import MemoryFile, read_extents
from tests.vhd_images import FIXED, Block, Vhd, summed

DISK = bytes(range(256)) * 320
DYNAMIC = Vhd(size=len(DISK), blocks={index: Block(DISK[index * 16384 :][:16384]) for index in range(5)})
PLAIN = Vhd(size=len(DISK), type=FIXED, body=DISK)


def opened(content: bytes, **request: Any) -> Any:
    return FORMAT.open(MemoryFile(content), OpenRequest(**request))


def whole(content: bytes) -> bytes:
    file = MemoryFile(content)
    driver = FORMAT.open(file, OpenRequest())
    return read_extents(driver, file, 0, driver.geometry.virtual_size)


def notes(content: bytes) -> list[str]:
    return [finding.message for finding in opened(content).findings]


def probed(content: bytes) -> int:
    return FORMAT.probe(content[:4096], len(content)) or FORMAT.probe_tail(content[-4096:], len(content))


def with_footer(content: bytes, **fields: Any) -> bytes:
    """The same image with another last footer."""
    return content[:-512] + replace(DYNAMIC, **fields).footer()


def repaired(content: bytes) -> bytes:
    file = MemoryFile(content)
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))  # type: ignore[attr-defined]
    return bytes(file.data)


@pytest.mark.parametrize("image", [DYNAMIC, PLAIN])
def test_a_good_image_is_known_and_has_no_notes(image: Vhd) -> None:
    content = image.content()
    assert probed(content) == 100
    assert whole(content) == DISK
    assert notes(content) == []
    assert opened(content).check().findings == []
    assert not opened(content).repair()
    opened(content, writable=True)


def test_a_fixed_image_is_found_by_its_end_alone() -> None:
    content = PLAIN.content()
    assert FORMAT.probe(content[:4096], len(content)) == 0
    nested = replace(PLAIN, body=PLAIN.footer() + DISK[512:]).content()
    assert FORMAT.probe(nested[:4096], len(nested)) == 0
    assert whole(nested) == PLAIN.footer() + DISK[512:]


@pytest.mark.parametrize("image", [DYNAMIC, PLAIN])
def test_a_footer_of_511_bytes(image: Vhd) -> None:
    content = image.content()[:-1]
    assert probed(content) == 100
    assert whole(content) == DISK
    opened(content, writable=True)


@pytest.mark.parametrize("end", [b"", b"\xc7" * 512, b"\0" * 512, b"conectix" + bytes(504)])
def test_the_copy_counts_where_the_last_footer_is_lost(end: bytes) -> None:
    content = DYNAMIC.content()[:-512] + end
    assert probed(content) == 100
    assert whole(content) == DISK
    (said,) = notes(content)
    assert said.endswith("the copy at the start counts")
    assert opened(content).check().corruptions == 0
    opened(content, writable=True)  # as after a crash
    mended = repaired(content)
    assert notes(mended) == []
    assert whole(mended) == DISK
    assert mended[-512:] == DYNAMIC.footer()


@pytest.mark.parametrize("start", [bytes(512), b"conectix" + bytes(504)])
def test_the_last_footer_counts_where_the_copy_is_lost(start: bytes) -> None:
    content = start + DYNAMIC.content()[512:]
    assert probed(content) >= 60
    assert whole(content) == DISK
    assert notes(content)[0].startswith(("there is no copy", "the copy of the footer at the start has a wrong"))
    with pytest.raises(ImageError, match="run tapfs repair") as caught:
        opened(content, writable=True)
    assert caught.value.kind is ErrorKind.READ_ONLY
    assert repaired(content) == DYNAMIC.content()


@pytest.mark.parametrize("image", [DYNAMIC, PLAIN])
def test_a_wrong_checksum_is_said_and_nothing_is_written(image: Vhd) -> None:
    content = bytearray(image.content())
    content[-1] ^= 1
    if image is DYNAMIC:
        content[511] ^= 1
    assert probed(bytes(content)) == 60
    assert whole(bytes(content)) == DISK
    assert notes(bytes(content)) == ["the checksum of the footer at the end is wrong"]
    assert opened(bytes(content)).check().corruptions == 1
    with pytest.raises(ImageError, match="the image can only be read") as caught:
        opened(bytes(content), writable=True)
    assert caught.value.kind is ErrorKind.READ_ONLY
    mended = repaired(bytes(content))
    assert notes(mended) == []
    opened(mended, writable=True)


def test_a_wrong_checksum_of_the_header_is_said_and_nothing_is_written() -> None:
    content = bytearray(DYNAMIC.content())
    content[512 + 36] ^= 1
    assert whole(bytes(content)) == DISK
    assert notes(bytes(content)) == ["the checksum of the dynamic header is wrong"]
    with pytest.raises(ImageError, match="run tapfs repair"):
        opened(bytes(content), writable=True)
    assert repaired(bytes(content)) == DYNAMIC.content()


def test_hidden_is_set_by_old_tapdisk_without_renewing_the_checksum() -> None:
    footer = bytearray(DYNAMIC.footer())
    footer[85] = 1
    content = bytes(footer) + DYNAMIC.content()[512:-512] + bytes(footer)
    driver = opened(content, writable=True)
    assert driver.findings == []
    assert driver.details()["notes"] == ["hidden: xapi has coalesced or deleted the disk"]


def test_two_good_footers_of_one_disk_differ_in_what_changes_over_time() -> None:
    content = with_footer(DYNAMIC.content(), hidden=1)
    assert whole(content) == DISK
    assert notes(content) == ["the footer at the end and its copy at the start differ; the one at the end counts"]
    assert opened(content).footer.hidden == 1
    opened(content, writable=True)


def test_a_growing_image_whose_last_footer_says_fixed_is_refused_and_no_guest_can_do_that() -> None:
    footer = DYNAMIC.footer()
    with pytest.raises(ImageError, match="says that the disk is fixed, and its copy at the start") as caught:
        opened(DYNAMIC.content()[:-512] + summed(footer[:60] + b"\0\0\0\2" + footer[64:], 64))
    assert caught.value.kind is ErrorKind.CORRUPT
    written = replace(PLAIN, body=footer.ljust(PLAIN.size, b"\0"))
    assert whole(written.content()) == written.body


@pytest.mark.parametrize("fields", [{"uuid": bytes(16)}, {"size": 16384}, {"type": 4}])
def test_two_good_footers_of_two_disks_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match="describe two disks") as caught:
        opened(with_footer(DYNAMIC.content(), **fields))
    assert caught.value.kind is ErrorKind.CORRUPT


@pytest.mark.parametrize("kind", [0, 1, 5, 6, 77])
def test_other_types_are_refused(kind: int) -> None:
    with pytest.raises(ImageError, match=f"the type of the disk is {kind}") as caught:
        opened(replace(PLAIN, type=kind).content())
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_a_disabled_image_is_refused_with_the_reason() -> None:
    content = b"v_poison" + DYNAMIC.content()[8:]
    assert probed(content) > 0
    with pytest.raises(ImageError, match="has disabled it"):
        opened(content)


@pytest.mark.parametrize("content", [b"", b"conectix", bytes(511), bytes(4096), PLAIN.footer()[:500]])
def test_no_footer_is_no_vhd(content: bytes) -> None:
    assert probed(content) == 0
    with pytest.raises(ImageError) as caught:
        opened(content)
    assert caught.value.kind is ErrorKind.INVALID_FORMAT
    assert "a fixed image that lost it is its disk" in str(caught.value)


def test_a_fixed_image_that_was_cut_is_refused() -> None:
    content = PLAIN.content()[1024:]
    with pytest.raises(ImageError, match="stand before the footer") as caught:
        opened(content)
    assert caught.value.kind is ErrorKind.CORRUPT
    report = opened(content, lenient=True).check()
    assert [finding.severity for finding in report.findings] == [Severity.CORRUPTION]


def test_junk_between_a_fixed_disk_and_its_footer_is_nobodys() -> None:
    content = DISK + b"\x77" * 1000 + PLAIN.footer()
    assert whole(content) == DISK
    assert notes(content) == []


def test_a_saved_state_is_said() -> None:
    footer = bytearray(DYNAMIC.footer())
    footer[84] = 1
    content = summed(bytes(footer), 64) + DYNAMIC.content()[512:-512] + summed(bytes(footer), 64)
    assert opened(content).details()["notes"][0].startswith("the machine is in a saved state")
