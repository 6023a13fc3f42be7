"""An overlay is committed into its base while others write it."""

from __future__ import annotations

import random
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

import tapfs
from tapfs import Image
from tapfs.disk.chain import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.jobs.live_commit import LiveCommit

SIZE = 8 << 20
BLOCK = 4096


class Writer(threading.Thread):
    """Writes, zeroes, discards and reads blocks of the image that `image()` gives, and knows what each must hold."""

    def __init__(self, model: bytearray, seed: int) -> None:
        super().__init__()
        self.model = model
        self.image: Image
        self.random = random.Random(seed)
        self.rest = threading.Lock()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.count = 0

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                with self.rest:
                    self.step()
        except BaseException as error:  # noqa: BLE001  raised by the test
            self.error = error

    def more(self) -> None:
        """Wait until it has done some more."""
        end = self.count + 50
        while self.count < end and self.error is None:
            time.sleep(0.002)

    def step(self) -> None:
        offset = self.random.randrange(SIZE // 512) * 512
        length = min(self.random.choice((512, BLOCK, 40960)), SIZE - offset)
        match self.random.randrange(6):
            case 0:
                self.image.write_zeroes(offset, length)
                self.model[offset : offset + length] = bytes(length)
            case 1:
                assert self.image.read(offset, length) == self.model[offset : offset + length]
            case 2:
                self.image.flush()
            case _:
                data = self.random.randbytes(8) * (length // 8)
                self.image.write(offset, data)
                self.model[offset : offset + length] = data
        self.count += 1


def chain(folder: Path, base_format: str, overlay_format: str, rng: random.Random) -> bytearray:
    """An overlay `top` over `base` over `root`, all with data; what the overlay reads as.

    A "packed" base has no parent, and one compressed cluster where the overlay has many.
    """
    model = bytearray(SIZE)
    kind = base_format.rsplit(maxsplit=1)[-1]
    below = root_format(base_format)
    alone = base_format in ALONE
    base, root = str(folder / "base"), str(folder / "root")
    if not alone:
        tapfs.create(root, below, SIZE)
        fill(folder / "root", below, base_format, model, rng)
    parent = (None, None) if alone else (root, below)
    tapfs.create(base, kind, SIZE, backing=parent[0], backing_format=parent[1])
    fill(folder / "base", kind, base_format, model, rng)
    if base_format.startswith("packed"):
        tapfs.convert(base, f"{base}.packed", target_format=kind, compressed=True)
        Path(f"{base}.packed").rename(base)
    tapfs.create(str(folder / "top"), overlay_format, SIZE, backing=base, backing_format=kind)
    fill(folder / "top", overlay_format, base_format, model, rng)
    return model


def fill(path: Path, format_name: str, base_format: str, model: bytearray, rng: random.Random) -> None:
    """Write here and there."""
    with opened(path, format_name, base_format) as image:
        for _ in range(60):
            offset = rng.randrange(SIZE // 512) * 512
            data = (rng.randbytes(8) * rng.choice((64, 512, 8192)))[: SIZE - offset]
            image.write(offset, data)
            model[offset : offset + len(data)] = data


def root_format(base_format: str) -> str:
    """Of what format the parent of the base is: some formats name no parent of another one."""
    return base_format if base_format in ("vhdx", "vmdk", "vdi") else "raw"


def opened(path: Path, format_name: str, base_format: str) -> Image:
    below = root_format(base_format)
    formats = [base_format.rsplit(maxsplit=1)[-1], below] if path.name == "top" else [below]
    return open_image(
        str(path), OpenOptions(format=format_name, writable=True, backing_formats=formats, write_base=True)
    )


#: Bases without a parent.
ALONE = ("raw", "packed qcow2")
CASES = [
    ("raw", "qcow2", False),
    ("vhd", "vhd", False),
    ("vhdx", "qcow2", False),
    ("vmdk", "qcow", True),
    ("vhdx", "vhdx", True),
    ("vmdk", "vmdk", False),
    ("vdi", "vdi", True),
    ("packed qcow2", "qcow", True),
]


@pytest.mark.parametrize(("base_format", "overlay_format", "undone"), CASES)
def test_a_disk_is_the_same_before_during_and_after(
    tmp_path: Path, base_format: str, overlay_format: str, *, undone: bool
) -> None:
    model = chain(tmp_path, base_format, overlay_format, random.Random(1))
    before = opened(tmp_path / "top", overlay_format, base_format)
    writer = Writer(model, 2)
    writer.image = before
    writer.start()
    commit = LiveCommit()
    try:
        with writer.rest:
            writer.image = commit.begin(before)
            before.abandon()
        commit.run()
        writer.more()
        with writer.rest:
            after = commit.undo() if undone else commit.complete()
            assert after is not None
            writer.image = after
            commit.close()
        writer.more()
    finally:
        writer.stop.set()
        writer.join()
    if writer.error is not None:
        raise writer.error
    expected = (["base"] if undone else []) + ([] if base_format in ALONE else ["root"])
    assert writer.image.read(0, SIZE) == model
    assert [Path(path).name for path in writer.image.parents] == expected
    writer.image.close()
    name = "top" if undone else "base"
    with opened(
        tmp_path / name, overlay_format if undone else base_format.rsplit(maxsplit=1)[-1], base_format
    ) as image:
        assert image.read(0, SIZE) == model
    assert tapfs.check(tmp_path / name).corruptions == 0


def test_what_is_read_through_the_overlay_follows_the_base(tmp_path: Path) -> None:
    """A compressed cluster of which the overlay hides a part moves, and its old place gets other data."""
    rng, cluster = random.Random(5), 65536
    noise = rng.randbytes(cluster // 2)
    model = bytearray(
        b"".join(noise[number:] + noise[:number] + bytes(cluster // 2) for number in range(SIZE // cluster))
    )
    (tmp_path / "plain").write_bytes(model)
    base, top = str(tmp_path / "base"), str(tmp_path / "top")
    tapfs.convert(str(tmp_path / "plain"), base, format="raw", target_format="qcow2", compressed=True)
    tapfs.create(top, "qcow", SIZE, backing=base, backing_format="qcow2")
    commit = LiveCommit()
    with opened(tmp_path / "top", "qcow", "packed qcow2") as before, closing(commit):
        served = commit.begin(before)
        assert served.read(0, SIZE) == model
        assert served.read(0, SIZE) == model  # from a merged map of the chain
        for first in range(3):
            for number in range(first, SIZE // cluster, 3):
                data = rng.randbytes(BLOCK)
                served.write(number * cluster, data)
                model[number * cluster : number * cluster + BLOCK] = data
            commit.run()
            assert served.read(0, SIZE) == model
        done = commit.complete()
        assert done.read(0, SIZE) == model
        done.close()
