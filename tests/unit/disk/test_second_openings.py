"""Files of which not everything is here, shown a second time: a snapshot or an overlay has the same bytes come."""

from __future__ import annotations

import io
import lzma
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.image import Image
from tapfs.disk.live import image_over, overlay_on
from tests import package_files
from tests.unit.disk.test_packed import seekable_zstd, xz_blocks
from tests.web_server import web_server

MIB = 1 << 20
SIZE = 2 * MIB

OPENED: dict[str, Callable[[Path, bytes, ExitStack], Image]] = {}


def opening(name: str) -> Callable[[Callable[[Path, bytes, ExitStack], Image]], None]:
    def noted(function: Callable[[Path, bytes, ExitStack], Image]) -> None:
        OPENED[name] = function

    return noted


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@opening("xz in one pass")
def _(folder: Path, image: bytes, _: ExitStack) -> Image:
    return tapfs.open(put(folder / "x.xz", lzma.compress(image, preset=0)))


@opening("xz of blocks")
def _(folder: Path, image: bytes, _: ExitStack) -> Image:
    return tapfs.open(put(folder / "x.xz", xz_blocks(image)))


@opening("zstd of frames")
def _(folder: Path, image: bytes, _: ExitStack) -> Image:
    return tapfs.open(put(folder / "x.zst", seekable_zstd(image)))


@opening("file object")
def _(_: Path, image: bytes, __: ExitStack) -> Image:
    return tapfs.open(io.BytesIO(image))


@opening("web server")
def _(_: Path, image: bytes, stack: ExitStack) -> Image:
    return tapfs.open(stack.enter_context(web_server(image)).url + "/x.qcow2")


@opening("packed on a web server")
def _(_: Path, image: bytes, stack: ExitStack) -> Image:
    return tapfs.open(stack.enter_context(web_server(xz_blocks(image))).url + "/x.qcow2.xz")


@opening("pieces in a package")
def _(folder: Path, image: bytes, _: ExitStack) -> Image:
    descriptor = package_files.ovf(["x"], attributes={"chunkSize": str(MIB), "size": str(len(image))})
    pieces = {f"x.{number:09}": image[number * MIB :][:MIB] for number in range(-(-len(image) // MIB))}
    return tapfs.open(package_files.archive(folder / "x.ova", {"x.ovf": descriptor, **pieces}))


@opening("package on a web server")
def _(folder: Path, image: bytes, stack: ExitStack) -> Image:
    package = package_files.ova(folder / "x.ova", {"x.qcow2": image}).read_bytes()
    return tapfs.open(stack.enter_context(web_server(package)).url + "/x.ova")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, bytes]:
    """An image with a snapshot, what its disk holds, and what that of the snapshot does."""
    path = tmp_path_factory.mktemp("image") / "x.qcow2"
    first = bytearray(random.Random(1).randbytes(SIZE))
    tapfs.create(path, "qcow2", SIZE)
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, first)
    tapfs.create_snapshot(path, "before")
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"changed")
    return path.read_bytes(), b"changed" + bytes(first[7:]), bytes(first)


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path, kept: tuple[bytes, bytes, bytes]) -> Iterator[Image]:
    name: str = request.param
    with ExitStack() as stack:
        yield stack.enter_context(OPENED[name](tmp_path, kept[0], stack))


@pytest.mark.parametrize("disk", OPENED, indirect=True)
def test_a_snapshot_has_its_bytes_come_whichever_is_closed_first(disk: Image, kept: tuple[bytes, bytes, bytes]) -> None:
    with disk.open_snapshot("before") as snapshot:
        assert snapshot.is_fetched
        assert snapshot.read(SIZE // 2, 100) == kept[2][SIZE // 2 :][:100]
        assert disk.read(0, 100) == kept[1][:100]
        assert snapshot.layers[0].file.identity == disk.layers[0].file.identity
    with disk.open_snapshot("before") as snapshot:
        disk.close()
        assert snapshot.read(0, SIZE) == kept[2]


@pytest.mark.parametrize("disk", ["xz of blocks", "package on a web server"], indirect=True)
def test_an_overlay_put_over_it_shows_what_was_not_here_before(
    disk: Image, kept: tuple[bytes, bytes, bytes], tmp_path: Path
) -> None:
    overlaid = overlay_on(disk, str(tmp_path / "over.qcow2"), None)
    with image_over(overlaid, disk, password=None, plan_log=None) as over:
        overlaid.layer.close()
        disk.close()
        assert over.read(0, SIZE) == kept[1]
