"""Bundles of Parallels Desktop: a state of a disk is read through the states that it was made from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tapfs.errors import ErrorKind, ImageError
from tests.conftest import REPOSITORY, Ran, unpack
from tests.unit.formats.parallels.test_parallels import Parallels

NONE = "{00000000-0000-0000-0000-000000000000}"
TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
BASE, MONDAY = "{11111111-1111-1111-1111-111111111111}", "{22222222-2222-2222-2222-222222222222}"

#: What each state holds of seven clusters; None is what the state below has.
STATES = {
    BASE: Parallels(clusters=(0, 1, None, 2, None, 3, None)),
    MONDAY: Parallels(clusters=(None, 0, 1, None, None, None, None), noise=100),
    TOP: Parallels(clusters=(None, None, 0, None, 1, None, None), noise=200),
}
PARENTS = {BASE: NONE, MONDAY: BASE, TOP: MONDAY}


def described(files: dict[str, tuple[str, str]], *, parents: dict[str, str] = PARENTS, more: str = "") -> str:
    """A descriptor of files, each with its type, by their states."""
    images = "".join(
        f"<Image><GUID>{state}</GUID><Type>{kind}</Type><File>{name}</File></Image>"
        for state, (name, kind) in files.items()
    )
    shots = "".join(
        f"<Shot><GUID>{state}</GUID><ParentGUID>{parent}</ParentGUID></Shot>" for state, parent in parents.items()
    )
    return (
        "<?xml version='1.0' encoding='UTF-8'?>\n<Parallels_disk_image Version=\"1.0\">"
        f"<Disk_Parameters><Disk_size>53</Disk_size>{more}</Disk_Parameters>"
        f"<StorageData><Storage>{images}</Storage></StorageData><Snapshots>{shots}</Snapshots></Parallels_disk_image>"
    )


def expected(*states: str) -> bytes:
    """The disk of states, the newest first."""
    cluster = STATES[BASE].cluster
    out = b""
    for index in range(7):
        images = [STATES[state] for state in states]
        places = [(image, image.clusters[index]) for image in images if image.clusters[index] is not None]
        out += places[0][0].stored(places[0][1] or 0) if places else bytes(cluster)
    return out[: 53 * 512]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of three states; its descriptor names one file by its path on another machine."""
    files: dict[str, tuple[str, str]] = {}
    for number, (state, image) in enumerate(STATES.items()):
        (tmp_path / f"disk.hdd.{number}.hds").write_bytes(image.content())
        files[state] = (f"disk.hdd.{number}.hds", "Compressed")
    files[BASE] = ("/Users/me/disk.hdd/disk.hdd.0.hds", "Compressed")
    (tmp_path / "DiskDescriptor.xml").write_text(described(files))
    return tmp_path


def read(path: Path) -> bytes:
    with tapfs_package.open(path) as disk:
        return disk.read(0, disk.size)


def change(bundle: Path, old: str, new: str) -> None:
    descriptor = bundle / "DiskDescriptor.xml"
    text = descriptor.read_text()
    assert old in text
    descriptor.write_text(text.replace(old, new))


def test_every_state_is_read_through_those_below(bundle: Path) -> None:
    assert read(bundle / "DiskDescriptor.xml") == expected(TOP, MONDAY, BASE)
    assert read(bundle / "disk.hdd.2.hds") == expected(TOP, MONDAY, BASE)
    assert read(bundle / "disk.hdd.1.hds") == expected(MONDAY, BASE)
    assert read(bundle / "disk.hdd.0.hds") == expected(BASE)
    chain = [layer["path"] for layer in tapfs_package.info(bundle / "DiskDescriptor.xml")["chain"]]
    assert [Path(name).name for name in chain] == ["DiskDescriptor.xml", *(f"disk.hdd.{n}.hds" for n in (2, 1, 0))]


def test_what_a_user_sees(bundle: Path, tapfs: Callable[..., Ran]) -> None:
    shown = tapfs("info", bundle / "DiskDescriptor.xml").out
    assert re.search(r"^backing: +disk\.hdd\.2\.hds \(parallels\)$", shown, re.MULTILINE)
    assert json.loads(tapfs("info", "--json", bundle / "DiskDescriptor.xml").out)["details"] == {
        "kind": "bundle",
        "states": 3,
    }
    assert tapfs("check", bundle / "DiskDescriptor.xml").code == 0


def test_a_base_that_is_plain(bundle: Path) -> None:
    (bundle / "disk.hdd.0.hds").write_bytes(expected(BASE))
    change(
        bundle,
        "<Type>Compressed</Type><File>/Users/me/disk.hdd/disk.hdd.0.hds",
        "<Type>Plain</Type><File>disk.hdd.0.hds",
    )
    assert read(bundle / "DiskDescriptor.xml") == expected(TOP, MONDAY, BASE)


def test_the_newest_state_is_the_one_that_is_named(bundle: Path) -> None:
    change(bundle, "<Snapshots>", f"<Snapshots><TopGUID>{MONDAY}</TopGUID>")
    assert read(bundle / "DiskDescriptor.xml") == expected(MONDAY, BASE)


def test_without_a_name_it_is_the_only_one_that_nothing_was_made_from(bundle: Path) -> None:
    change(bundle, TOP, TOP.replace("5fba", "6666"))
    assert read(bundle / "DiskDescriptor.xml") == expected(TOP, MONDAY, BASE)


def test_a_file_in_a_folder_of_its_own_is_alone(tmp_path: Path) -> None:
    path = tmp_path / "alone.hds"
    path.write_bytes(STATES[MONDAY].content())
    assert read(path) == expected(MONDAY)


@pytest.mark.parametrize(
    ("name", "old", "new", "kind", "message"),
    [
        ("disk.hdd.2.hds", "disk.hdd.2.hds", "other.hds", ErrorKind.CORRUPT, "none of the files"),
        ("disk.hdd.2.hds", f"<GUID>{MONDAY}</GUID><Type>", "<GUID>x</GUID><Type>", ErrorKind.CORRUPT, "no file of the"),
        ("disk.hdd.2.hds", "disk.hdd.1.hds", "gone.hds", ErrorKind.NOT_FOUND, "gone.hds"),
        ("disk.hdd.2.hds", "<Disk_size>53", "<Disk_size>", ErrorKind.CORRUPT, "a disk of no sectors"),
        ("DiskDescriptor.xml", "<Type>Compressed", "<Type>Squeezed", ErrorKind.CORRUPT, "unknown type"),
        ("DiskDescriptor.xml", TOP, MONDAY, ErrorKind.CORRUPT, "a state of the disk twice"),
        ("DiskDescriptor.xml", f"<ParentGUID>{MONDAY}", f"<ParentGUID>{TOP}", ErrorKind.CORRUPT, "comes back"),
        ("DiskDescriptor.xml", "</StorageData>", "<Storage/></StorageData>", ErrorKind.UNSUPPORTED, "in 2 parts"),
        ("DiskDescriptor.xml", "</Snapshots>", "", ErrorKind.CORRUPT, "no XML"),
        ("DiskDescriptor.xml", "<Parallels_", "<!DOCTYPE a><Parallels_", ErrorKind.CORRUPT, "document type"),
        (
            "DiskDescriptor.xml",
            "</Disk_size>",
            "</Disk_size><Encryption><Engine>{1}</Engine></Encryption>",
            ErrorKind.UNSUPPORTED,
            "encrypted",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_an_error_and_no_zeros(
    bundle: Path, name: str, old: str, new: str, kind: ErrorKind, message: str
) -> None:
    change(bundle, old, new)
    with pytest.raises(ImageError, match=re.escape(message)) as caught:
        read(bundle / name)
    assert caught.value.kind is kind


def test_who_may_not_look_at_the_descriptor_gets_no_zeros(bundle: Path, tapfs: Callable[..., Ran]) -> None:
    elsewhere = bundle / "elsewhere"
    elsewhere.mkdir()
    file = bundle / "disk.hdd.2.hds"
    for words in (["convert", "-O", "raw", file, bundle / "copy"], ["map", file]):
        refused = tapfs(*words, "--backing-root", elsewhere)
        assert (refused.code, refused.out) == (19, "")
        assert "DiskDescriptor.xml lies outside" in refused.err
    assert "not looked at" in tapfs("info", "--no-backing", file).out
    with tapfs_package.open(file, backing_root=str(bundle)) as disk:
        assert disk.read(0, disk.size) == expected(TOP, MONDAY, BASE)


def test_several_newest_states_are_none(bundle: Path) -> None:
    change(bundle, TOP, TOP.replace("5fba", "6666"))
    change(bundle, f"<ParentGUID>{MONDAY}", f"<ParentGUID>{BASE}")
    with pytest.raises(ImageError, match="which of its 3 files is the newest"):
        read(bundle / "DiskDescriptor.xml")


def test_the_folder_says_what_to_open(bundle: Path) -> None:
    with pytest.raises(ImageError, match=r"open the image in it: .* of an \.hdd its DiskDescriptor\.xml"):
        read(bundle)


def test_a_bundle_of_parallels_desktop(tmp_path: Path) -> None:
    folder = REPOSITORY / "fixtures/dfvfs/hfsplus.hdd"
    (image,) = folder.glob("*.xz")
    (tmp_path / "DiskDescriptor.xml").write_bytes((folder / "DiskDescriptor.xml").read_bytes())
    file = unpack(image, tmp_path)
    assert read(tmp_path / "DiskDescriptor.xml") == read(file)
