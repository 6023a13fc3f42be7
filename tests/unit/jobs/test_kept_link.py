"""An overlay that names its base by an identity matches it before, during and after a commit."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.jobs import commit

SIZE = 1 << 20


def make(folder: Path, format_name: str, size: int) -> tuple[Path, Path]:
    """A base, and an overlay of so many bytes over it that has data at its end."""
    base, over = folder / "base.img", folder / "over.img"
    tapfs.create(base, format_name, SIZE)
    tapfs.create(over, format_name, size, backing="base.img", backing_format=format_name)
    with tapfs.open(over, writable=True) as disk:
        disk.write(size - 512, b"x" * 512)
    return base, over


@pytest.mark.parametrize("format_name", ["vhd", "vhdx", "vdi", "vmdk"])
@pytest.mark.parametrize("fails", [False, True])
def test_an_overlay_matches_a_base_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, *, fails: bool
) -> None:
    size = 3 * SIZE
    base, over = make(tmp_path, format_name, size)
    grow = commit.resize_image
    seen: list[bytes] = []

    def look() -> None:
        with tapfs.open(over) as disk:
            seen.append(disk.read(size - 512, 512))

    def watched(*words: object, **more: object) -> int:
        look()
        if fails:
            raise ImageError(ErrorKind.NO_SPACE, "is full", path=str(base), op="resize")
        grown = grow(*words, **more)  # type: ignore[arg-type]
        look()
        return grown

    monkeypatch.setattr(commit, "resize_image", watched)
    if fails:
        with pytest.raises(ImageError, match="is full"):
            tapfs.commit(over)
    else:
        assert tapfs.commit(over).data_bytes
        with tapfs.open(base) as disk:
            assert disk.read(size - 512, 512) == b"x" * 512
    look()
    assert set(seen) == {b"x" * 512}
    if format_name != "vhd":  # whose UUID stays when it is written
        with tapfs.open(base, writable=True, write_base=True) as disk:
            disk.write(0, b"y")
        with pytest.raises(ImageError, match="not the one that it was made over"):
            tapfs.open(over)


@pytest.mark.parametrize("format_name", ["vhdx", "vdi", "vmdk"])
def test_what_a_commit_has_said_in_between_is_gone_afterwards(tmp_path: Path, format_name: str) -> None:
    _, over = make(tmp_path, format_name, SIZE)
    before = over.read_bytes()
    tapfs.commit(over)
    after = over.read_bytes()
    assert after != before
    if format_name == "vhdx":
        with tapfs.open(over) as disk:
            locator = disk.layers[0].driver.details()["parent_locator"]
        assert isinstance(locator, dict)
        assert sorted(locator) == ["parent_linkage", "relative_path"]
    elif format_name == "vmdk":
        assert b"#parentCID2=ffffffff\n" in after
    else:
        assert after[440:456] != bytes(16)
    with tapfs.open(over) as disk:
        assert not any(extent.depth == 0 and extent.present for extent in disk.extents())


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize(
    ("over_format", "base_format"), [("vhdx", "vmdk"), ("vhdx", "raw"), ("vmdk", "vdi"), ("vhd", "vhdx")]
)
def test_an_overlay_is_committed_into_a_base_that_its_format_cannot_name(
    tmp_path: Path, over_format: str, base_format: str, *, grows: bool
) -> None:
    size = 2 * SIZE if grows else SIZE
    base, over = make(tmp_path, over_format, size)
    base.unlink()
    tapfs.create(base, base_format, SIZE)
    tapfs.commit(over, backing_formats=[base_format], any_parent=True)
    with tapfs.open(base, format=base_format) as disk:
        assert disk.size >= size
        assert disk.read(size - 512, 512) == b"x" * 512
    with tapfs.open(over, backing_formats=[base_format], any_parent=True) as disk:
        assert disk.read(size - 512, 512) == b"x" * 512
        assert not any(extent.depth == 0 and extent.present for extent in disk.extents())
    if base_format != "raw":  # which has no identity, so nothing could have been lost
        with pytest.raises(ImageError, match="not the one that it was made over"):
            tapfs.open(over, backing_formats=[base_format])


@pytest.mark.parametrize("grows", [False, True])
def test_a_vmdk_without_room_in_its_descriptor_matches_its_base_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, grows: bool
) -> None:
    size = 2 * SIZE if grows else SIZE
    base, over = make(tmp_path, "vmdk", size)
    content = bytearray(over.read_bytes())
    start = content.index(b"# Disk DescriptorFile")
    end, stop = content.index(b"\0", start), start + 20 * 512
    content[end:stop] = b"#" * (stop - end - 1) + b"\n"
    over.write_bytes(content)
    overwrite = commit.overwrite
    seen: list[bytes] = []

    def watched(*words: object, **more: object) -> int:
        with tapfs.open(over, shared=True) as disk:
            seen.append(disk.read(size - 512, 512))
        return overwrite(*words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(commit, "overwrite", watched)
    tapfs.commit(over)
    assert seen == [b"x" * 512]
    assert over.read_bytes()[stop - 512 : stop] == content[stop - 512 : stop]
    with tapfs.open(over) as disk:
        assert disk.read(size - 512, 512) == b"x" * 512
    with tapfs.open(base, writable=True, write_base=True) as disk:
        disk.write(0, b"y")
    with pytest.raises(ImageError, match="not the one that it was made over"):
        tapfs.open(over)
