"""With a backing root nothing outside it is opened, and no message tells what is there."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tests.unit.host.test_file import opened_names

SIZE = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a backing file, and beside it what an image from a stranger may be after."""
    for folder in ("root/sub", "outside/sub"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("root/base", "root/sub/base", "outside/base"):
        (tmp_path / name).write_bytes(b"b" * SIZE)
    os.mkfifo(tmp_path / "outside/fifo")
    (tmp_path / "root/link").symlink_to("../outside/base")
    (tmp_path / "root/way").symlink_to("../outside/sub/../../root/base")
    (tmp_path / "root/inner").symlink_to("sub/base")
    (tmp_path / "beside").symlink_to(tmp_path / "root")
    return tmp_path / "root"


def image_over(name: str, folder: Path) -> Path:
    """An image in the folder whose header names that backing file, whatever that is."""
    path = folder / "image.qcow"
    path.unlink(missing_ok=True)
    tapfs.create(str(path), "qcow", SIZE)
    content = path.read_bytes()
    header = struct.pack(">QI", len(content), len(name.encode()))
    path.write_bytes(content[:8] + header + content[20:] + name.encode())
    return path


def refusal(image: Path, root: Path) -> ImageError:
    with pytest.raises(ImageError) as raised:
        tapfs.open(image, backing_root=str(root), backing_formats=["raw"])
    return raised.value


@pytest.mark.parametrize(
    "name",
    ["base", "./sub/../base", "inner", "way", "{root}/base", "{beside}/base", "file:base", "../root/base", "sub/base"],
)
def test_what_lies_inside_is_found(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any way that leads there without a folder outside: `way` has one."""
    image = image_over(name.format(root=root, beside=root.parent / "beside"), root)
    for spelled in (root, root.parent / "beside"):
        if name == "way":
            assert refusal(image, spelled).kind is ErrorKind.DENIED
        else:
            with tapfs.open(image, backing_root=str(spelled), backing_formats=["raw"]) as disk:
                assert disk.read(0, 1) == b"b"
    monkeypatch.chdir(root)
    if name != "way":
        tapfs.open("image.qcow", backing_root=".", backing_formats=["raw"]).close()


@pytest.mark.parametrize(
    "name",
    [
        "../outside/{}",
        "{outside}/{}",
        "link",
        "sub/../../outside/{}",
        "../outside/{}/../../root/base",
        "{outside}/{}/../../root/base",
        "nbd:/../../outside/{}",
        "/dev/{}",
        "/proc/self/{}",
    ],
)
def test_outside_everything_looks_alike(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a fifo, a folder, a device, nothing at all: one answer, and none of them is opened."""
    (root / "nbd:").mkdir()
    opened = opened_names(monkeypatch)
    answers = set[str]()
    for there in ("base", "sub", "fifo", "missing", "null"):
        said = name.replace("{outside}", str(root.parent / "outside")).replace("{}", there)
        error = refusal(image_over(said, root), root)
        assert error.kind is ErrorKind.DENIED
        answers.add(str(error).replace(said, "NAME"))
    assert len(answers) == 1
    assert not [path for path in opened if path.startswith((str(root.parent / "outside"), "/dev/", "/proc/"))]


def test_what_is_missing_inside_is_missing(root: Path) -> None:
    assert refusal(image_over("none", root), root).kind is ErrorKind.NOT_FOUND
    assert refusal(image_over("sub", root), root).kind is ErrorKind.INVALID_FORMAT
    assert refusal(image_over("base/below", root), root).kind is ErrorKind.NOT_FOUND
    (root / "loop").symlink_to("loop")
    assert refusal(image_over("loop", root), root).kind is ErrorKind.IO
    os.mkfifo(root / "fifo")
    assert "is a fifo" in str(refusal(image_over("fifo", root), root))


def test_the_image_itself_may_lie_elsewhere(root: Path) -> None:
    image = image_over("../root/base", root.parent / "outside")
    tapfs.open(image, backing_root=str(root), backing_formats=["raw"]).close()
    assert refusal(image_over("base", root.parent / "outside"), root).kind is ErrorKind.DENIED


def test_the_root_of_the_file_system_holds_everything(root: Path) -> None:
    tapfs.open(image_over(str(root / "link"), root), backing_root="/", backing_formats=["raw"]).close()


def test_a_backing_file_that_the_user_names_must_lie_inside_too(root: Path) -> None:
    image = image_over("none", root)
    for name, inside in ((root / "base", True), (root.parent / "outside/base", False)):
        if inside:
            tapfs.open(image, backing=str(name), backing_root=str(root), backing_formats=["raw"]).close()
            continue
        with pytest.raises(ImageError) as raised:
            tapfs.open(image, backing=str(name), backing_root=str(root), backing_formats=["raw"])
        assert raised.value.kind is ErrorKind.DENIED


def test_without_a_root_a_device_or_fifo_is_not_opened_either(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opened_names(monkeypatch)
    for name in ("../outside/fifo", "/dev/urandom"):
        with pytest.raises(ImageError) as raised:
            tapfs.open(image_over(name, root), backing_formats=["raw"])
        assert raised.value.kind is ErrorKind.INVALID_FORMAT
    assert not [path for path in opened if path.startswith("/dev/") or path.endswith("fifo")]
