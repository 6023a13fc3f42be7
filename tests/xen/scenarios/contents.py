"""Contents for disks, written and looked for again."""

from __future__ import annotations

import lzma
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.laboratory.commands import digest, run, tapfs
from tests.xen.scenarios.dom0 import IMAGES

FIXTURES = Path("/payload/fixtures")
TREE_SEED = 4


@contextmanager
def mounted(device: str, *options: str) -> Iterator[Path]:
    """A file system of dom0's."""
    place = Path(tempfile.mkdtemp(prefix="mounted-"))
    run("mount", *options, device, str(place))
    try:
        yield place
    finally:
        run("umount", str(place))
        place.rmdir()


def write_tree(place: Path, seed: int = TREE_SEED) -> None:
    """A few dozen files of many sizes, in folders; the same for the same seed."""
    numbers = random.Random(seed)
    for folder in range(4):
        (place / f"folder{folder}").mkdir()
        for name in range(8):
            data = numbers.randbytes(numbers.choice((0, 1, 511, 4096, 5000, 65536, 300_000)))
            (place / f"folder{folder}/file{name}").write_bytes(data)


def check_tree(place: Path, seed: int = TREE_SEED) -> None:
    """All that `write_tree` wrote, and nothing else."""
    expected = Path(tempfile.mkdtemp(prefix="expected-"))
    try:
        write_tree(expected, seed)
        paths = sorted(path.relative_to(expected) for path in expected.rglob("*"))
        found = sorted(path.relative_to(place) for path in place.rglob("*") if path.name != "lost+found")
        assert found == paths, f"found {found}"
        for path in paths:
            if (expected / path).is_file():
                assert digest(expected / path) == digest(place / path), f"{path} differs"
    finally:
        shutil.rmtree(expected)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")


def use_as_file_system(device: str) -> None:
    """Make a file system, write, unmount, mount again, compare, check."""
    run("mke2fs", "-q", "-F", "-t", "ext4", device)
    with mounted(device) as place:
        write_tree(place)
    drop_caches()
    with mounted(device, "-o", "ro") as place:
        check_tree(place)
    run("e2fsck", "-fn", device)


def unpack_fixture(name: str) -> Path:
    """A file of fixtures/ in dom0's folder of images, under its own name."""
    path = IMAGES / Path(name).name.removesuffix(".xz")
    path.write_bytes(lzma.decompress((FIXTURES / name).read_bytes()))
    return path


def new_raw(name: str, mebibytes: int) -> Path:
    path = IMAGES / name
    with path.open("wb") as file:
        file.truncate(mebibytes << 20)
    return path


def new_qcow(name: str, mebibytes: int) -> Path:
    path = IMAGES / name
    tapfs("create", "--force", "-f", "qcow", str(path), f"{mebibytes}M")
    return path
