"""The engines: which one serves what, and what native threads and the kernel can that pyfuse3 cannot."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Ran, sha256_of
from tests.fuse.conftest import Mounts, is_traced, refused, wait_for

MIB = 1 << 20

native = pytest.mark.parametrize("mounts", ["native"], indirect=True)
both = pytest.mark.parametrize("mounts", ["native", "passthrough"], indirect=True)


def engine_of(mounts: Mounts) -> str:
    """What the registry says of the only mount."""
    (entry,) = mounts.runtime.glob("*.json")
    engine: str = json.loads(entry.read_text())["engine"]
    return engine


def created(mounts: Mounts, path: Path, size: str = "16M") -> Path:
    """A new qcow image."""
    assert mounts.run("create", "-f", "qcow", path, size).code == 0
    return path


def allocated(mounts: Mounts, image: Path) -> int:
    """Bytes of guest data that an image has allocated, by its own check."""
    checked = mounts.run("check", "-f", "qcow", "--json", image)
    assert checked.code == 0, checked
    number: int = json.loads(checked.out)["allocated_bytes"]
    return number


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("mounts", ["auto"], indirect=True)
def test_auto_takes_the_best(mounts: Mounts, sample: Path, tmp_path: Path) -> None:
    raw = tmp_path / "image.raw"
    raw.write_bytes(sample.read_bytes())
    qcow = created(mounts, tmp_path / "image.qcow")
    for image, options, engine in (
        (raw, [], "passthrough"),
        (raw, ["-f", "raw", "--rw"], "native"),  # the kernel would write past the end of the disk
        (raw, ["-f", "raw", "--direct"], "native"),  # it would go through the page cache
        (qcow, [], "native"),
        (raw, ["--engine", "native"], "native"),
        (raw, ["--engine", "pyfuse3"], "pyfuse3"),
    ):
        directory = mounts.mount(image, *options)
        assert engine_of(mounts) == engine
        (directory / "disk").read_bytes()
        mounts.umount(directory)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("mounts", ["auto"], indirect=True)
def test_the_kernel_serves_a_flat_file_that_has_nothing_else_in_it(
    mounts: Mounts, sample: Path, tmp_path: Path
) -> None:
    """It knows neither a place in the file nor the end of the disk: it would show a VHD's footer behind the disk."""
    content = sample.read_bytes()
    for format_name, options, engine in (
        ("vmdk", "subformat=monolithicFlat", "passthrough"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "native"),
        ("vhd", "subformat=fixed", "native"),
        ("vdi", "static=on", "native"),
    ):
        image = tmp_path / f"{options}.{format_name}"
        assert mounts.run("convert", "-O", format_name, "-o", options, sample, image).code == 0
        directory = mounts.mount(image)
        assert engine_of(mounts) == engine
        assert (directory / "disk").read_bytes() == content
        mounts.umount(directory)


def test_passthrough_asked_for_in_vain(mounts: Mounts, tmp_path: Path) -> None:
    image = created(mounts, tmp_path / "image.qcow")
    failed = mounts.run("mount", "--engine", "passthrough", image, mounts.directory())
    assert failed.code == 12
    assert "the kernel cannot serve this disk by itself" in failed.err
    assert failed.err.count("\n") == 1
    assert mounts.left_behind() == []


#: `tapfs` on a machine where the native threads do not start.
_WITHOUT_NATIVE = """
import sys
from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel.fuse_server import FuseServer
def start(self, threads):
    raise ImageError(ErrorKind.IO, "no threads today")
FuseServer.start = start
from tapfs.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("mounts", ["auto"], indirect=True)
def test_without_native_threads(mounts: Mounts, sample: Path) -> None:
    mounts.command = [sys.executable, "-c", _WITHOUT_NATIVE]
    directory = mounts.mount(sample)
    assert engine_of(mounts) == "pyfuse3"
    assert (directory / "disk").read_bytes() == sample.read_bytes()
    mounts.umount(directory)
    failed = mounts.run("mount", "--engine", "native", sample, mounts.directory())
    assert failed == Ran(10, "", "tapfs: error: no threads today\n")
    assert mounts.left_behind() == []


#: `tapfs` where the engine refuses every image.
_REFUSING = """
import sys
from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel.engine import EngineDisk
def add_layer(self, *_, **layer):
    raise ImageError(ErrorKind.OUT_OF_BOUNDS, "no such layer today")
EngineDisk.add_layer = add_layer
from tapfs.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("mounts", ["auto", "native", "pyfuse3"], indirect=True)
def test_an_image_that_the_engine_refuses_is_not_mounted(mounts: Mounts, sample: Path) -> None:
    """Another engine would mount it, and answer every read with an error."""
    mounts.command = [sys.executable, "-c", _REFUSING]
    failed = mounts.run("mount", sample, mounts.directory())
    assert failed == Ran(13, "", "tapfs: error: no such layer today\n")
    assert mounts.left_behind() == []


# Passthrough


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("mounts", ["passthrough"], indirect=True)
def test_passthrough_reads(mounts: Mounts, sample: Path) -> None:
    content = sample.read_bytes()
    directory = mounts.mount(sample)
    assert engine_of(mounts) == "passthrough"
    with (directory / "disk").open("rb") as disk:
        assert disk.read() == content
        with mmap.mmap(disk.fileno(), 0, access=mmap.ACCESS_READ) as view:
            assert view[:] == content
    assert json.loads((directory / "info.json").read_text())["virtual_size"] == len(content)
    with refused(errno.EROFS):
        os.open(directory / "disk", os.O_RDWR)
    mounts.umount(directory)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("mounts", ["passthrough"], indirect=True)
def test_passthrough_writes_are_synced(mounts: Mounts, tmp_path: Path) -> None:
    """The engine sees none of the writes, and must not take the file for clean."""
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(4 * MIB))
    directory = mounts.mount(image, "-f", "raw", "--rw")
    assert engine_of(mounts) == "passthrough"
    (pid,) = mounts.processes()
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-e", "trace=fdatasync", "-o", trace, "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
        wait_for(lambda: is_traced(pid, tracer.pid))
        with (directory / "disk").open("r+b", buffering=0) as disk:
            synced: list[int] = []
            for turn in range(3):
                disk.seek(turn * MIB)
                disk.write(b"through")
                os.fsync(disk.fileno())
                synced.append(trace.read_text().count("fdatasync("))
            disk.write(b"!")
        closed = trace.read_text().count("fdatasync(")
        tracer.send_signal(signal.SIGINT)
    assert synced == [1, 2, 3]
    assert closed == 4
    modified = image.stat().st_mtime_ns
    assert (directory / "disk").stat().st_mtime_ns == modified
    mounts.umount(directory)
    assert image.read_bytes()[2 * MIB : 2 * MIB + 8] == b"through!"


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("mounts", ["passthrough"], indirect=True)
def test_reader_that_outlives_a_forced_unmount(mounts: Mounts, sample: Path) -> None:
    """The kernel goes on to serve it; the image is free for others all the same."""
    directory = mounts.mount(sample)
    descriptor = os.open(directory / "disk", os.O_RDONLY)
    try:
        assert mounts.run("umount", "--force", directory) == Ran(0, "", "")
        assert os.pread(descriptor, 100, 0) == sample.read_bytes()[:100]
        again = mounts.mount(sample, "--engine", "native", "-f", "raw", "--rw")
        mounts.umount(again)
    finally:
        with suppress(OSError):  # ENOTCONN, of nobody's interest
            os.close(descriptor)


# What native threads can


@native
def test_direct_and_mapped_access(mounts: Mounts, tmp_path: Path) -> None:
    image = created(mounts, tmp_path / "image.qcow", "4M")
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    content = bytearray(random.Random(1).randbytes(4 * MIB))
    with (directory / "disk").open("r+b") as disk:
        disk.write(content)
    for flags in (os.O_RDWR, os.O_RDWR | os.O_DIRECT):
        descriptor = os.open(directory / "disk", flags)
        try:
            with mmap.mmap(descriptor, 4 * MIB) as view:
                assert view[:] == content
                view[5000:5010] = content[5000:5010] = os.urandom(10)
                view.flush()
            with mmap.mmap(-1, 8192) as buffer:  # aligned, as O_DIRECT wants it
                assert os.preadv(descriptor, [buffer], 4096) == 8192
                assert buffer[:] == content[4096 : 4096 + 8192]
                buffer[:] = content[MIB : MIB + 8192] = os.urandom(8192)
                assert os.pwritev(descriptor, [buffer], MIB) == 8192
        finally:
            os.close(descriptor)
        assert (directory / "disk").read_bytes() == content
    mounts.umount(directory)
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow", "-O", "raw", image, flat], check=True)
    assert flat.read_bytes() == content


def data_of(path: Path) -> list[tuple[int, int]]:
    """The ``(offset, length)`` of the data of a file, between the holes."""
    found: list[tuple[int, int]] = []
    with path.open("rb", buffering=0) as file, refused(errno.ENXIO):
        end = 0
        while True:  # until there is no more
            start = file.seek(end, os.SEEK_DATA)
            end = file.seek(start, os.SEEK_HOLE)
            found.append((start, end - start))
    return found


@native
def test_holes(mounts: Mounts, tmp_path: Path) -> None:
    image = created(mounts, tmp_path / "image.qcow", "1G")
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    disk = directory / "disk"
    assert data_of(disk) == []
    written = [(0, 4096), (5 * MIB, 3 * MIB), (900 * MIB, 4096), ((1 << 30) - 4096, 4096)]
    with disk.open("r+b", buffering=0) as file:
        for offset, length in written:
            file.seek(offset)
            file.write(b"x" * length)
    assert data_of(disk) == written
    assert disk.stat().st_blocks * 512 < 8 * MIB  # du
    copy = tmp_path / "copy"
    subprocess.run(["cp", "--sparse=always", disk, copy], check=True)
    assert copy.stat().st_blocks * 512 < 8 * MIB
    mapped = subprocess.run(
        ["qemu-img", "map", "-f", "raw", "--output=json", disk], check=True, capture_output=True
    ).stdout
    assert [(run["start"], run["length"]) for run in json.loads(mapped) if run["data"]] == written
    mounts.umount(directory)
    subprocess.run(["qemu-img", "compare", "-f", "qcow", "-F", "raw", image, copy], check=True, capture_output=True)


@both
@pytest.mark.usefixtures("root")
def test_holes_of_raw(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    assert data_of(directory / "disk") == data_of(sample)
    mounts.umount(directory)


@native
def test_punched_and_zeroed(mounts: Mounts, tmp_path: Path) -> None:
    image = created(mounts, tmp_path / "image.qcow")
    content = bytearray(random.Random(2).randbytes(16 * MIB))
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    disk = directory / "disk"
    with disk.open("r+b", buffering=0) as file:
        file.write(content)
        for words, offset, length in (
            (["--punch-hole"], MIB, 4 * MIB),
            (["--zero-range"], 6 * MIB + 100, 10_000),
            (["--zero-range", "--keep-size"], 15 * MIB, 5 * MIB),  # clipped
            (["--punch-hole"], 12 * MIB - 7, 20),
        ):
            subprocess.run(["fallocate", *words, "-o", str(offset), "-l", str(length), disk], check=True)
            content[offset : offset + length] = bytes(min(length, len(content) - offset))
            assert len(content) == 16 * MIB
        file.seek(0)
        assert file.read() == content
        taken = subprocess.run(["fallocate", "-l", "4096", disk], check=False, capture_output=True, text=True)
        assert os.strerror(errno.EOPNOTSUPP) in taken.stderr
    mounts.umount(directory)
    assert allocated(mounts, image) <= 16 * MIB - 5 * MIB
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow", "-O", "raw", image, flat], check=True)
    assert flat.read_bytes() == content


@native
@pytest.mark.usefixtures("root")
def test_discards_of_a_loop_device(mounts: Mounts, tmp_path: Path) -> None:
    image = created(mounts, tmp_path / "image.qcow")
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    loop = subprocess.run(
        ["losetup", "-f", "--show", directory / "disk"], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["dd", "if=/dev/urandom", f"of={loop}", "bs=1M", "count=16", "status=none"], check=True)
        subprocess.run(["blkdiscard", "-o", str(4 * MIB), "-l", str(8 * MIB), loop], check=True)
        subprocess.run(["blockdev", "--flushbufs", loop], check=True)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
    wait_for(lambda: mounts.run("umount", directory).code == 0)
    assert allocated(mounts, image) == 8 * MIB
    assert image.stat().st_blocks * 512 < 9 * MIB


@native
@pytest.mark.parametrize("direct", [0, 1])
def test_fio_verifies(mounts: Mounts, tmp_path: Path, direct: int) -> None:
    image = created(mounts, tmp_path / "image.qcow", "64M")
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    job = f"""--name=job --size=64M --io_size=96M --rw=randrw --ioengine=libaio --iodepth=8 --bsrange=512-128k
        --direct={direct} --fsync=64 --serialize_overlap=1 --verify=crc32c --verify_fatal=1 --do_verify=1
        --verify_backlog=256""".split()
    job = ["fio", *job, f"--filename={directory}/disk"]
    done = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    inside = sha256_of(directory / "disk")
    mounts.umount(directory)
    assert mounts.run("check", "-f", "qcow", image).code == 0
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow", "-O", "raw", image, flat], check=True)
    assert sha256_of(flat) == inside


#: Writes a numbered block to a place of its own and says its number once an fsync has returned.
_WRITER = """
import os, random, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
places = list(range(1024))
random.Random(int(sys.argv[2])).shuffle(places)
for number, place in enumerate(places):
    os.pwrite(descriptor, number.to_bytes(4, "big") * 512, place * 65536 + 1024)
    if number % 4 == 3:
        os.fsync(descriptor)
        print(number, flush=True)
"""


@pytest.mark.parametrize("turn", range(3))
def test_killed_while_writing(mounts: Mounts, tmp_path: Path, turn: int) -> None:
    image = created(mounts, tmp_path / "image.qcow", "64M")
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    (pid,) = mounts.processes()
    command = [sys.executable, "-c", _WRITER, str(directory / "disk"), str(turn)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(5 + 7 * turn)]
        mounts.kill(pid)
        said += writer.stdout.readlines()
        assert writer.wait(60) != 0  # the rest of its writes failed
    acknowledged = int(said[-1])
    with refused(errno.ENOTCONN):
        os.statvfs(directory)
    cleaned = mounts.run("umount", directory)
    assert cleaned.code == 0
    assert "had died; cleaned up" in cleaned.err
    assert mounts.run("check", "-f", "qcow", image).code in {0, 3}  # clean, or leaks only
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow", "-O", "raw", image, flat], check=True)
    content = flat.read_bytes()
    places = list(range(1024))
    random.Random(turn).shuffle(places)
    for number, place in enumerate(places[: acknowledged + 1]):
        assert content[place * 65536 + 1024 :][:2048] == number.to_bytes(4, "big") * 512


@native
def test_no_descriptor_leaks_in_the_server(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    (pid,) = mounts.processes()
    descriptors, threads = Path(f"/proc/{pid}/fd"), Path(f"/proc/{pid}/task")

    def use() -> None:
        for _ in range(200):
            (directory / "missing").exists()
            with (directory / "disk").open("rb") as disk:
                disk.read(1000)

    def count() -> tuple[int, int]:
        return len(list(descriptors.iterdir())), len(list(threads.iterdir()))

    use()
    before = count()
    use()
    use()
    assert count() == before
    mounts.umount(directory)


@native
def test_ten_cycles(mounts: Mounts, sample: Path) -> None:
    directory = mounts.directory()
    for _ in range(10):
        assert mounts.run("mount", sample, directory) == Ran(0, "", "")
        with (directory / "disk").open("rb") as disk:
            assert disk.read(4) == b"boot"
        mounts.umount(directory)
    assert mounts.left_behind() == []
