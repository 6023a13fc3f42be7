"""A parent that its child names by a UUID is found in the folders that may hold it; nothing else is taken for it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, Gate, ImageError
from tests import vhd_images, vmdk_images
from tests.conftest import Ran
from tests.vdi_images import CREATION, DIFFERENCING, FREE, MIB, MODIFICATION, VdiImage

Run = Callable[..., Ran]
SIZE = 2 * MIB
CHILD = uuid.UUID(int=77)
BASE = uuid.UUID("5b8f0a5c-0c1f-4e0c-9a53-5c0c2f9d6a01")


@pytest.fixture(name="command")
def command_fixture(request: pytest.FixtureRequest) -> Run:
    """The command in this process, beside the package of the same name."""
    command: Run = request.getfixturevalue("tapfs")
    return command


def parent_image(byte: bytes = b"p", **fields: uuid.UUID) -> bytes:
    return VdiImage(SIZE, [0, FREE], {0: byte * MIB}, **fields).content()  # type: ignore[arg-type]


def child_image(link: uuid.UUID = CREATION, modification: uuid.UUID = MODIFICATION) -> bytes:
    image = VdiImage(SIZE, [FREE, 0], {0: b"c" * MIB}, DIFFERENCING, creation=CHILD, link=link)
    image.parent_modification = modification
    return image.content()


@pytest.fixture
def child(tmp_path: Path) -> Path:
    folder = tmp_path / "machine"
    folder.mkdir()
    path = folder / "child.vdi"
    path.write_bytes(child_image())
    return path


def read(path: Path, **options: object) -> bytes:
    with tapfs.open(path, **options) as disk:  # type: ignore[arg-type]
        return disk.read(0, 1) + disk.read(MIB, 1)


def refused(path: Path, **options: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        tapfs.open(path, **options)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize("place", [".", "..", "Snapshots"])
def test_a_parent_is_found_where_virtualbox_puts_it(child: Path, place: str) -> None:
    (child.parent / place).mkdir(exist_ok=True)
    (child.parent / place / "whatever name.bin").write_bytes(parent_image())
    assert read(child) == b"pc"


def test_a_relative_name_is_enough(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (child.parent / "base.vdi").write_bytes(parent_image())
    monkeypatch.chdir(child.parent)
    assert read(Path("child.vdi")) == b"pc"


def test_other_folders_are_named_by_the_user(child: Path, tmp_path: Path, command: Run) -> None:
    elsewhere = tmp_path / "a" / "b"
    elsewhere.mkdir(parents=True)
    (elsewhere / "base.vdi").write_bytes(parent_image())
    error = refused(child)
    assert error.kind is ErrorKind.NOT_FOUND
    assert str(CREATION) in str(error)
    assert str(child.parent) in str(error)
    assert "parent_folders=['DIR']" in str(error)
    assert read(child, parent_folders=[tmp_path / "none", elsewhere]) == b"pc"
    failed = command("map", child)
    assert failed.code == 17
    assert "--parent-folder DIR" in failed.err
    assert command("map", "--parent-folder", elsewhere, child).code == 0


def test_a_missing_parent_is_never_zeros(child: Path, command: Run) -> None:
    (child.parent / "other.vdi").write_bytes(parent_image(creation=uuid.UUID(int=5)))
    (child.parent / "noise.vdi").write_bytes(b"x" * 5000)
    (child.parent / "disk.raw").write_bytes(bytes(5000))
    assert refused(child).kind is ErrorKind.NOT_FOUND
    shown = json.loads(command("info", "--json", child).out)
    assert shown["backing"]["name"] == f"uuid:{CREATION}"
    assert [link["state"] for link in shown["chain"]] == ["open", "missing"]
    alone = json.loads(command("info", "--json", "--no-backing", child).out)
    assert [link["state"] for link in alone["chain"]] == ["open", "not looked at"]
    assert command("convert", "-O", "raw", child, child.parent / "out.raw").code == 17


def test_a_parent_that_was_changed_since_is_refused(child: Path) -> None:
    (child.parent / "base.vdi").write_bytes(parent_image(modification=uuid.UUID(int=9)))
    error = refused(child)
    assert error.kind is ErrorKind.CORRUPT
    assert str(MODIFICATION) in str(error)
    assert read(child, any_parent=True) == b"pc"


def test_a_child_that_does_not_say_which_change_takes_the_parent(child: Path) -> None:
    child.write_bytes(child_image(modification=uuid.UUID(int=0)))
    (child.parent / "base.vdi").write_bytes(parent_image(modification=uuid.UUID(int=9)))
    assert read(child) == b"pc"


def test_of_two_copies_the_one_that_was_not_changed_is_the_parent(child: Path) -> None:
    (child.parent / "changed.vdi").write_bytes(parent_image(b"x", modification=uuid.UUID(int=9)))
    (child.parent / "kept.vdi").write_bytes(parent_image())
    assert read(child) == b"pc"


def test_two_copies_that_are_alike_are_a_choice_of_the_user(child: Path, command: Run) -> None:
    for name in ("one.vdi", "two.vdi"):
        (child.parent / name).write_bytes(parent_image())
    error = refused(child)
    assert error.kind is ErrorKind.INVALID_ARGUMENT
    assert "one.vdi or " in str(error)
    assert read(child, backing=str(child.parent / "one.vdi"), backing_formats=["vdi"]) == b"pc"
    assert command("info", "--no-backing", child).code == 0


def test_two_names_of_one_file_are_one_parent(child: Path) -> None:
    (child.parent / "one.vdi").write_bytes(parent_image())
    (child.parent / "two.vdi").hardlink_to(child.parent / "one.vdi")
    assert read(child) == b"pc"


def test_symbolic_links_are_not_followed(child: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "base.vdi").write_bytes(parent_image())
    (child.parent / "link.vdi").symlink_to(tmp_path / "far" / "base.vdi")
    assert refused(child).kind is ErrorKind.NOT_FOUND


def test_the_gate_judges_what_is_found(child: Path, tmp_path: Path) -> None:
    (tmp_path / "base.vdi").write_bytes(parent_image())
    assert read(child) == b"pc"
    assert refused(child, gate=Gate.inside(child.parent)).kind is ErrorKind.NOT_FOUND
    assert read(child, gate=Gate.inside(tmp_path)) == b"pc"
    assert refused(child, gate=Gate.nothing()).kind is ErrorKind.NOT_FOUND


def test_a_chain_of_snapshots_is_followed(child: Path) -> None:
    grandchild = VdiImage(SIZE, [FREE, FREE], kind=DIFFERENCING, creation=uuid.UUID(int=88), link=CHILD)
    (child.parent / "top.vdi").write_bytes(grandchild.content())
    (child.parent / "base.vdi").write_bytes(parent_image())
    assert read(child.parent / "top.vdi") == b"pc"


def test_a_chain_that_comes_back_is_refused(child: Path) -> None:
    child.write_bytes(child_image(link=CHILD, modification=uuid.UUID(int=0)))
    error = refused(child)
    assert error.kind is ErrorKind.CORRUPT
    assert "comes back" in str(error)


def test_an_overlay_is_made_over_a_parent_and_knows_it_again(tmp_path: Path, command: Run) -> None:
    base, top = tmp_path / "base.vdi", tmp_path / "elsewhere" / "deep" / "top.vdi"
    base.write_bytes(parent_image())
    top.parent.mkdir(parents=True)
    assert command("create", "-f", "vdi", "-b", base, "-F", "vdi", top).code == 0
    assert refused(top).kind is ErrorKind.NOT_FOUND
    assert read(top, parent_folders=[tmp_path]) == b"p\0"
    with _opened(top, writable=True, parent_folders=[tmp_path]) as disk:
        disk.write(MIB, b"t")
        disk.write_zeroes(0, MIB)
    assert read(top, parent_folders=[tmp_path]) == b"\0t"
    with _opened(base, writable=True) as disk:
        disk.write(0, b"q")
    assert refused(top, parent_folders=[tmp_path]).kind is ErrorKind.CORRUPT


def _opened(path: Path, **options: object) -> tapfs.Image:
    return tapfs.open(path, **options)  # type: ignore[arg-type]


def test_a_conversion_over_a_parent_elsewhere_needs_no_search(tmp_path: Path, command: Run) -> None:
    base, raw, top = tmp_path / "base.vdi", tmp_path / "new.raw", tmp_path / "a" / "b" / "top.vdi"
    base.write_bytes(parent_image())
    raw.write_bytes(b"p" * MIB + b"n" * MIB)
    top.parent.mkdir(parents=True)
    assert command("convert", "-f", "raw", "-O", "vdi", "-b", base, "-F", "vdi", raw, top).code == 0
    assert read(top, parent_folders=[tmp_path]) == b"pn"


def test_a_parent_that_has_no_uuid_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "base.raw"
    raw.write_bytes(bytes(SIZE))
    with pytest.raises(ImageError, match="the parent has none that lasts"):
        tapfs.create(str(tmp_path / "top.vdi"), "vdi", backing=str(raw), backing_format="raw")


def vhd_parent(path: Path, kind: int = vhd_images.DYNAMIC) -> uuid.UUID:
    """A VHD with `p` in its first mebibyte; the UUID that VirtualBox makes of the 16 bytes in its footer."""
    image = vhd_images.Vhd(
        size=SIZE,
        type=kind,
        block_size=MIB,
        blocks={0: vhd_images.Block(b"p" * MIB)},
        body=b"p" * MIB,
        creator=b"vbox",
    )
    vhd_images.write_to(path, image)
    return uuid.UUID(bytes_le=vhd_images.MINE)


@pytest.mark.parametrize("kind", [vhd_images.DYNAMIC, vhd_images.FIXED])
def test_a_vdi_over_a_vhd_has_the_bytes_of_its_footer(child: Path, kind: int) -> None:
    child.write_bytes(child_image(vhd_parent(child.parent / "base.vhd", kind), uuid.UUID(int=0)))
    assert vhd_images.MINE in child.read_bytes()
    assert read(child) == b"pc"


@pytest.mark.parametrize("how", ["create", "rebase"])
@pytest.mark.parametrize("over", ["vhd", "vmdk"])
def test_a_vdi_is_made_over_another_format(tmp_path: Path, command: Run, how: str, over: str) -> None:
    base, top = tmp_path / f"base.{over}", tmp_path / "top.vdi"
    if over == "vhd":
        vhd_parent(base)
    else:
        lines = f'ddb.uuid.image="{BASE}"\nddb.uuid.modification="{MODIFICATION}"\n'
        base.write_bytes(vmdk_images.monolithic({0: b"p" * 8192}, SIZE, more=lines))
    if how == "create":
        assert command("create", "-f", "vdi", "-b", base, "-F", over, top).code == 0
    else:
        assert command("create", "-f", "vdi", top, SIZE).code == 0
        assert command("rebase", "-u", "-b", base, "-F", over, top).code == 0
    assert (vhd_images.MINE if over == "vhd" else BASE.bytes_le) in top.read_bytes()
    with _opened(top) as disk:
        assert disk.read(0, 1) == b"p"


def test_a_vhd_of_virtualbox_over_a_vdi_names_its_uuid(tmp_path: Path) -> None:
    (tmp_path / "base.vdi").write_bytes(parent_image(creation=BASE))
    image = vhd_images.differencing(
        size=SIZE,
        block_size=MIB,
        blocks={1: vhd_images.Block(b"c" * MIB)},
        creator=b"vbox",
        parent_uuid=BASE.bytes_le,
        locators=((b"W2ru", ".\\base.vdi".encode("utf-16-le")),),
    )
    child = vhd_images.write_to(tmp_path / "child.vhd", image)
    assert read(child) == b"pc"
    vhd_images.write_to(child, vhd_images.replace(image, parent_uuid=BASE.bytes))
    assert refused(child).kind is ErrorKind.CORRUPT
