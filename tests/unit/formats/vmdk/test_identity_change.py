"""A new content ID in a descriptor: as long as it should be where that is safe, and nothing else is changed."""

from __future__ import annotations

from itertools import chain, combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapfs
from tapfs.formats.vmdk.descriptor import Descriptor, parse_descriptor
from tapfs.formats.vmdk.identity_change import identity_change
from tapfs.plan import Write
from tests.vmdk_images import monolithic

MIB = 1 << 20
HEAD = "# Disk DescriptorFile\nversion=1\n"
BODY = '# Extent description\nRW 2048 FLAT "d-flat" 0\n\n# The Disk Data Base\n#DDB\nddb.adapterType = "ide"\n'


def changed(text: str, room: int | None = None) -> tuple[Descriptor, bytes]:
    """The descriptor after the change, and the bytes of its file."""
    before = parse_descriptor(text.encode(), "x")
    change = identity_change(before, "x", room)
    out = bytearray(text.encode())
    for step in change.writes:
        assert isinstance(step, Write)
        out += bytes(max(0, step.host_offset + len(step.data) - len(out)))
        out[step.host_offset : step.host_offset + len(step.data)] = step.data
    after = parse_descriptor(bytes(out), "x")
    assert after.cid == change.cid
    return after, bytes(out)


@pytest.mark.parametrize("line", ["", "CID=1\n", "cid = abc\n", 'CID="1234567"\n', "CID=12345678\n"])
@pytest.mark.parametrize("room", [None, 20 * 512])
def test_it_has_eight_digits_where_the_text_ends_in_its_sector(line: str, room: int | None) -> None:
    after, out = changed(HEAD + line + BODY, room)
    assert len(after.values["cid"].content) == 8
    assert out.endswith(BODY.encode())


def test_a_line_that_is_new_ends_as_the_others_do() -> None:
    _, out = changed((HEAD + BODY).replace("\n", "\r\n"))
    assert out.count(b"\r\n") == out.count(b"\n") == (HEAD + BODY).count("\n") + 1
    assert out.splitlines()[2].startswith(b"CID=")


@pytest.mark.parametrize("line", ["", "CID=1\n"])
def test_a_comment_of_the_sector_gives_the_room(line: str) -> None:
    text = HEAD + line + BODY + "".join(f'ddb.{number:03} = "{"x" * 40}"\n' for number in range(30))
    after, out = changed(text)
    assert len(after.values["cid"].content) == 8
    assert len(out) == len(text)
    assert out[512:] == text.encode()[512:]
    assert b"\n#" in out[: out.index(b"RW 2048")]


@pytest.mark.parametrize(("line", "digits"), [("", 0), ("CID=1\n", 1)])
def test_without_room_it_is_as_long_as_it_was(line: str, digits: int) -> None:
    text = HEAD + line + BODY.replace("#", "k=") + "".join(f'ddb.{number:03} = "{"x" * 40}"\n' for number in range(30))
    after, out = changed(text)
    assert len(out) == len(text)
    assert len(after.values["cid"].content if digits else "") == digits
    # An embedded one has the bytes that the header says, and no more.
    text = HEAD + line + BODY.replace("#", "k=")
    _, out = changed(text, len(text))
    assert len(out) == len(text)


def test_a_comment_that_is_not_ascii_is_left_alone() -> None:
    """It tells how the names of files are encoded."""
    text = HEAD + BODY.replace("# Extent description", "# Ausdehnungen für Böse") + "x = y\n" * 200
    _, out = changed(text.replace("# The Disk Data Base\n#DDB\n", ""))
    assert "# Ausdehnungen für Böse".encode() in out


LINES = st.sampled_from(
    [
        *(
            "# a comment that is long enough",
            "#",
            "",
            "encoding=UTF-8",
            'changeTrackPath="a"',
            f"ddb.longContentID={32 * '0'}",
        ),
        *("ddb.uuid.modification=00000000-0000-0000-0000-000000000000", "ddb.comment = " + 200 * "x", "\t# x  "),
    ]
)


@given(
    before=st.lists(LINES, max_size=6),
    cid=st.sampled_from(["", "CID=1", "  CID = 12", "CID=1234567", "CID=fffffffe"]),
    after=st.lists(LINES, max_size=6),
    ending=st.sampled_from(["\n", "\r\n"]),
    room=st.sampled_from([None, 0, 600, 10240]),
)
def test_any_part_of_the_change_leaves_a_descriptor(
    before: list[str], cid: str, after: list[str], ending: str, room: int | None
) -> None:
    """A crash may leave any of the sectors: each is old or new."""
    lines = ["# Disk DescriptorFile", *before, *([cid] if cid else []), *after, 'RW 2048 FLAT "d" 0', "parentCID=7"]
    text = ending.join([*lines, ""]).encode()
    old = parse_descriptor(text, "x")
    limit = None if room is None else max(room, len(text))
    change = identity_change(old, "x", limit)
    writes = [step for step in change.writes if isinstance(step, Write)]
    assert bool(change.grow) <= (room is None)
    assert len(writes) == len(change.writes)
    out = bytearray(text)
    for some in chain.from_iterable(combinations(writes, count) for count in range(len(writes) + 1)):
        out = bytearray(text)
        for step in some:
            assert step.host_offset // 512 == (step.host_offset + len(step.data) - 1) // 512
            out += bytes(max(0, step.host_offset + len(step.data) - len(out)))
            out[step.host_offset : step.host_offset + len(step.data)] = step.data
        assert limit is None or len(out) <= limit
        new = parse_descriptor(bytes(out), "x")
        assert [each._replace(at=0) for each in new.extents] == [each._replace(at=0) for each in old.extents]
        assert new.parent_cid == 7
        assert new.codec == old.codec
    assert parse_descriptor(bytes(out), "x").cid == change.cid


def test_a_disk_by_hand_gets_its_content_id_at_the_first_write(tmp_path: Path) -> None:
    (tmp_path / "d-flat").write_bytes(bytes(MIB))
    path = tmp_path / "d.vmdk"
    path.write_text(HEAD + BODY)
    tapfs.open(path, writable=True).close()
    assert path.read_text() == HEAD + BODY
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"x")
    said = parse_descriptor(path.read_bytes(), "x")
    assert said.cid is not None
    assert path.read_text().startswith(HEAD + f"CID={said.cid:08x}\n# Extent")
    # A delta over it knows it now.
    delta = tmp_path / "delta.vmdk"
    tapfs.create(delta, "vmdk", MIB, backing="d.vmdk", backing_format="vmdk")
    tapfs.open(delta).close()
    with tapfs.open(path, writable=True, write_base=True) as disk:
        disk.write(0, b"y")
    with pytest.raises(tapfs.ImageError, match="is not the one that it was made over"):
        tapfs.open(delta)


def test_an_embedded_descriptor_with_a_short_one(tmp_path: Path) -> None:
    path = tmp_path / "d.vmdk"
    content = monolithic({}, MIB)
    text = content[512 : 21 * 512].replace(b"CID=12345678\n", b"CID=123\n", 1)
    path.write_bytes(content[:512] + text.ljust(20 * 512, b"\0") + content[21 * 512 :])
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"x")
    with tapfs.open(path) as disk:
        (identity,) = disk.layers[0].driver.identities  # type: ignore[attr-defined]
        assert disk.read(0, 1) == b"x"
    assert tapfs.check(path).findings == []
    assert identity != "cid:00000123"
