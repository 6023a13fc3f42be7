"""Images of one block table whose header is overwritten: a salvage makes the header anew, or says why it cannot."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.open_options import OpenOptions
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.salvage import Salvaged, open_salvaged
from tapfs.salvage import SalvageRequest

MIB = 1 << 20
#: A disk that ends inside a block, with scattered data.
SIZE = 12 * MIB + 700 * 512


def made(folder: Path, kind: str, *, with_table: bool = False, **options: str) -> tuple[Path, bytes]:
    """An image, and its disk; `with_table`: that has a partition up to its end, which says how long it is."""
    choice, content = random.Random(kind), bytearray(SIZE)
    for at in (0, 5 * MIB + 65536, 3 * MIB, 9 * MIB, 65536):
        content[at : at + 65536] = choice.randbytes(65536)
    if with_table:
        entry = bytes([0, 0, 2, 0, 0x83, 0, 0, 0]) + (1).to_bytes(4, "little") + (SIZE // 512 - 1).to_bytes(4, "little")
        content[:512] = bytes(446) + entry + bytes(48) + b"\x55\xaa"
    image = folder / "image"
    (folder / "raw").write_bytes(content)
    tapfs.convert(folder / "raw", image, format="raw", target_format=kind, options=options)
    return image, bytes(content)


def overwrite(image: Path, stop: int) -> None:
    with image.open("r+b") as file:
        file.write(bytes(stop))


def salvaged(image: Path, kind: str, **known: int) -> Salvaged:
    request = SalvageRequest(virtual_size=known.get("size"), cluster_bytes=known.get("block"))
    return open_salvaged(str(image), OpenOptions(format=kind, salvage=request, cut=True))


def contents(image: Path, kind: str, **known: int) -> tuple[bytes, list[str], list[str]]:
    """The disk, and what was rebuilt and is in doubt."""
    before = image.read_bytes()
    found = salvaged(image, kind, **known)
    with found.image as disk:
        read = disk.read(0, disk.size)
    assert image.read_bytes() == before
    return read, list(found.found.rebuilt), list(found.found.doubts)


@pytest.mark.parametrize(
    ("kind", "options", "stop", "rebuilt"),
    [
        ("vhd", {}, 1536, ["the dynamic header"]),
        ("vhd", {"block_size": "65536"}, 1536, ["the dynamic header"]),
        ("vhdx", {}, 512, ["the identifier"]),
        ("vhdx", {"block_size": "1M"}, MIB, ["the identifier", "both headers", "both region tables"]),
    ],
    ids=str,
)
def test_a_header_is_made_anew(
    tmp_path: Path, kind: str, options: dict[str, str], stop: int, rebuilt: list[str]
) -> None:
    image, content = made(tmp_path, kind, **options)
    assert contents(image, kind) == (content, [], [])
    overwrite(image, stop)
    with pytest.raises(ImageError):
        tapfs.open(image, format=kind)
    read, said, _ = contents(image, kind)
    assert read == content
    assert len(said) == len(rebuilt)
    assert all(text.startswith(part) for text, part in zip(said, rebuilt, strict=True))


def test_the_map_of_a_vdi_says_its_size_in_blocks(tmp_path: Path) -> None:
    image, content = made(tmp_path, "vdi")
    overwrite(image, MIB)
    read, rebuilt, doubts = contents(image, "vdi")
    assert read == content.ljust(13 * MIB, b"\0")
    assert len(rebuilt) == 1
    assert any("may end within the last one" in text for text in doubts)
    assert contents(image, "vdi", size=SIZE)[0] == content
    with pytest.raises(ImageError, match="does not have the 13 blocks"):
        salvaged(image, "vdi", size=14 * MIB)


def test_a_cut_vdi_without_a_header_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    image, content = made(tmp_path, "vdi")
    overwrite(image, 512)
    os.truncate(image, image.stat().st_size - 3 * MIB // 2)
    found = salvaged(image, "vdi", size=SIZE)
    assert any("was cut" in text for text in found.found.doubts)
    with found.image as disk:
        assert disk.read(0, 65536) == content[:65536]
        with pytest.raises(ImageError):
            disk.read(9 * MIB, 65536)


def test_a_vhd_without_any_footer_is_as_long_as_its_partition_table_says(tmp_path: Path) -> None:
    image, content = made(tmp_path, "vhd", with_table=True, block_size="65536")
    overwrite(image, 1536)
    os.truncate(image, image.stat().st_size - 512)
    read, rebuilt, doubts = contents(image, "vhd")
    assert read[:SIZE] == content
    assert [text.split(",")[0].split(" (")[0] for text in rebuilt] == ["the dynamic header", "the footer"]
    assert any("its partition table says so" in text for text in doubts)
    assert contents(image, "vhd", size=SIZE)[0] == content


def test_a_parent_that_the_user_names_takes_the_place_of_one_whose_name_is_lost(tmp_path: Path) -> None:
    base, content = made(tmp_path, "vhd")
    base.rename(tmp_path / "base.vhd")
    over = tmp_path / "over.vhd"
    tapfs.create(over, "vhd", backing=str(tmp_path / "base.vhd"), backing_format="vhd")
    with tapfs.open(over, writable=True) as disk:
        disk.write(7 * MIB, b"\5" * 65536)
    overwrite(over, 1536)
    read, _, doubts = contents(over, "vhd")
    assert any("name is lost" in text for text in doubts)
    assert read == bytes(7 * MIB) + b"\5" * 65536 + bytes(SIZE - 7 * MIB - 65536)
    parent = tapfs.driver.BackingReference(str(tmp_path / "base.vhd"), "vhd")
    options = OpenOptions(format="vhd", backing=parent.name, any_parent=True, salvage=SalvageRequest(backing=parent))
    with open_salvaged(str(over), options).image as disk:
        assert disk.read(0, SIZE) == content[: 7 * MIB] + b"\5" * 65536 + content[7 * MIB + 65536 :]


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("vdi", lambda image: overwrite(image, MIB + 512)),
        ("vhd", lambda image: overwrite(image, 2048)),
        ("vhdx", lambda image: overwrite(image, 4 * MIB)),
        ("vdi", lambda image: image.write_bytes(random.Random(1).randbytes(3 * MIB))),
        ("vhd", lambda image: image.write_bytes(random.Random(2).randbytes(3 * MIB))),
        ("vhdx", lambda image: image.write_bytes(random.Random(3).randbytes(3 * MIB))),
        ("vdi", lambda image: os.truncate(image, 100)),
        ("vhd", lambda image: os.truncate(image, 100)),
        ("vhdx", lambda image: os.truncate(image, 100)),
    ],
)
def test_without_its_table_nothing_is_told_of_an_image(
    tmp_path: Path, kind: str, damage: Callable[[Path], object]
) -> None:
    image, _ = made(tmp_path, kind)
    damage(image)
    with pytest.raises(ImageError) as raised:
        salvaged(image, kind)
    assert raised.value.kind is ErrorKind.INVALID_FORMAT
