"""`tapfs mount --files`: the file system inside, one command up, one down, nothing left whatever happens."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Ran, sha256_of
from tests.fuse.conftest import (
    MIB,
    Mounts,
    ext4,
    loop_devices,
    make_file_system,
    refused,
    somebody,
    wait_for,
    without_waiting,
)

pytestmark = pytest.mark.usefixtures("root", "no_new_loop_device")


@pytest.fixture
def partitioned(tmp_path: Path, content: Path) -> Path:
    """A raw disk: 1 nothing known, 2 swap, 3 ext4."""
    path = tmp_path / "partitioned.raw"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    table = (
        "label: gpt\nstart=1MiB, size=4MiB\nstart=5MiB, size=4MiB\nstart=9MiB, size=24MiB\nstart=40MiB, size=20MiB\n"
    )
    subprocess.run(["sfdisk", "-q", str(path)], input=table.encode(), check=True)
    swap = tmp_path / "swap"
    swap.write_bytes(bytes(4 * MIB))
    subprocess.run(["mkswap", str(swap)], check=True, capture_output=True)
    with path.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(swap.read_bytes())
    swap.unlink()
    ext4(path, content, 24, 9 * MIB)
    return path


def same_tree(one: Path, other: Path) -> bool:
    """Whether all files of the first tree are in the second with the same bytes."""
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    return bool(files) and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def dirty(image: Path) -> None:
    """Give an ext4 a journal to be replayed: its file system is copied while it is mounted and changed."""
    copy, inside = image.with_suffix(".live"), image.with_suffix(".dir")
    shutil.copyfile(image, copy)
    inside.mkdir()
    subprocess.run(["mount", "-o", "loop", copy, inside], check=True)
    try:
        (inside / "journalled").write_text("only in the journal\n")
        subprocess.run(["sync", "-f", inside], check=True)
        shutil.copyfile(copy, image)
    finally:
        subprocess.run(["umount", inside], check=True)
        inside.rmdir()
        copy.unlink()


def test_whole_disk(mounts: Mounts, flat: Path, content: Path) -> None:
    before = sha256_of(flat)
    directory = mounts.mount(flat, "--files")
    assert mounts.mounted() == [str(directory)]
    assert same_tree(content, directory)
    with refused(30):
        (directory / "new").touch()
    (entry,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert (entry["mountpoint"], entry["shows"], entry["file_system"], entry["partition"]) == (
        str(directory),
        "files",
        "ext4",
        None,
    )
    mounts.umount(directory)
    assert mounts.left_behind() == []
    assert sha256_of(flat) == before


def test_the_only_partition(mounts: Mounts, partitioned: Path, content: Path) -> None:
    directory = mounts.mount(partitioned, "--files")
    assert same_tree(content, directory)
    assert "files of partition 3" in mounts.run("list").out
    mounts.umount(directory)


@pytest.mark.parametrize("way", ["--rw", "--temp"])
def test_writing(mounts: Mounts, partitioned: Path, content: Path, tmp_path: Path, way: str) -> None:
    image = tmp_path / "image.qcow"
    assert mounts.run("convert", "-O", "qcow", partitioned, image).code == 0
    before = sha256_of(image)
    directory = mounts.mount(image, "--files", "--partition", 3, way)
    shutil.copytree(content, directory / "copy")
    (directory / "text").unlink()
    mounts.umount(directory)
    if way == "--temp":
        assert sha256_of(image) == before
        return
    assert mounts.run("check", image).code == 0
    # Seen by others: QEMU's qcow, e2fsck.
    subprocess.run(["qemu-img", "convert", "-f", "qcow", "-O", "raw", image, partitioned], check=True)
    subprocess.run(["e2fsck", "-fn", f"{partitioned}?offset={9 * MIB}"], check=True, capture_output=True)
    directory = mounts.mount(image, "--files")
    assert same_tree(content, directory / "copy")
    assert not (directory / "text").exists()
    mounts.umount(directory)


@pytest.mark.parametrize(
    "case",
    [
        ("partitioned", ["--partition", "9"], 17, "no partition 9"),
        ("partitioned", ["--partition", "2"], 12, "swap space"),
        ("partitioned", ["--partition", "1"], 17, "no known file system"),
        ("several", [], 64, "partition 3 (ext4 'files'), partition 4 (ext4 'other')"),
        ("sample", [], 17, "no known file system"),
        ("damaged", [], 2, "ext4"),
        ("flat", ["-o", "uid=5"], 12, "owners and modes of its own"),
    ],
)
def test_mounting_fails(
    mounts: Mounts,
    request: pytest.FixtureRequest,
    content: Path,
    case: tuple[str, list[str], int, str],
) -> None:
    name, options, code, words = case
    image: Path = request.getfixturevalue({"several": "partitioned", "damaged": "flat"}.get(name, name))
    if name == "several":
        ext4(image, content, 20, 40 * MIB, "other")
    if name == "damaged":
        with image.open("r+b") as file:
            file.seek(1024 + 100 * 4)
            file.write(b"\xff" * 200)
            file.seek(1024 + 0x58)
            file.write(b"\xff\xff")  # an impossible inode size
    for more in ([], ["--foreground"]):
        failed = mounts.run("mount", *more, "--files", *options, image, mounts.directory())
        assert failed.code == code, failed
        assert failed.out == ""
        assert words in failed.err.splitlines()[-1]
        assert all(line.startswith("tapfs: ") for line in failed.err.splitlines())
        assert "Traceback" not in failed.err
        assert mounts.left_behind() == []


def test_options_that_do_not_go_together(mounts: Mounts, flat: Path) -> None:
    for options in (["--partition", "1"], ["-o", "suid"], ["-o", "nonsense"], ["-o", "umask=8"], ["-o", "uid=-1"]):
        assert mounts.run("mount", *options, flat, mounts.directory()).code == 64


@pytest.mark.parametrize("kind", ["ext4", "vfat"])
def test_flags(mounts: Mounts, tmp_path: Path, content: Path, flat: Path, kind: str) -> None:
    """Of strangers' images nothing is trusted unless that is said: by the kernel and by FUSE programs."""
    image = flat if kind == "ext4" else tmp_path / "image.raw"
    if kind == "vfat":
        make_file_system(image, kind, content)
    for options, expected in (([], {"nosuid", "nodev"}), (["-o", "suid,dev,noexec"], {"noexec"})):
        directory = mounts.mount(image, "--files", *options)
        said = subprocess.run(["findmnt", "-no", "VFS-OPTIONS", directory], check=True, capture_output=True, text=True)
        assert set(said.stdout.strip().split(",")) & {"nosuid", "nodev", "noexec"} == expected
        mounts.umount(directory)


def test_busy_mount_point(mounts: Mounts, flat: Path) -> None:
    directory = mounts.mount(flat, "--files")
    again = mounts.run("mount", "--files", flat, directory)
    assert (again.code, "is a mount point already (ext4)" in again.err) == (18, True)
    assert mounts.mounted() == [str(directory)]
    mounts.umount(directory)


def test_in_use(mounts: Mounts, flat: Path) -> None:
    others = loop_devices()
    directory = mounts.mount(flat, "--files", "--rw", "-f", "raw")
    with somebody(cwd=directory) as user:
        busy = mounts.run("umount", directory)
        assert busy.code == 15
        assert f"{directory}: is busy: used by process {user.pid} (sleep)" in busy.err
        assert busy.err.count("\n") == 1
        (directory / "still").write_text("works\n")
        forced = mounts.run("umount", "--force", directory)
        assert (forced.code, forced.out, without_waiting(forced.err)) == (0, "", "")
        assert mounts.left_behind() == []
    wait_for(lambda: loop_devices() <= others)
    subprocess.run(["e2fsck", "-fp", flat], check=False, capture_output=True)
    read = mounts.mount(flat, "--files")
    assert (read / "still").read_text() == "works\n"  # what was written before was written back
    mounts.umount(read)


@pytest.mark.parametrize("command", [["umount"], ["umount", "-l"]])
def test_unmounted_from_outside(mounts: Mounts, flat: Path, command: list[str]) -> None:
    directory = mounts.mount(flat, "--files", "--rw", "-f", "raw")
    (directory / "new").write_text("data\n")
    subprocess.run([*command, directory], check=True)
    wait_for(lambda: not mounts.left_behind())
    assert mounts.left_behind() == []
    subprocess.run(["e2fsck", "-fn", flat], check=True, capture_output=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_both(mounts: Mounts, flat: Path, number: signal.Signals) -> None:
    directory = mounts.mount(flat, "--files", "--rw", "-f", "raw")
    (directory / "new").write_bytes(b"x" * MIB)
    (pid,) = mounts.processes()
    os.kill(pid, number)
    wait_for(lambda: not mounts.left_behind())
    assert mounts.left_behind() == []
    subprocess.run(["e2fsck", "-fn", flat], check=True, capture_output=True)


def test_foreground(mounts: Mounts, flat: Path, content: Path) -> None:
    directory = mounts.directory()
    with mounts.start("mount", "--foreground", "--files", flat, directory) as process:
        # The hidden mount is taken away last.
        wait_for(lambda: (directory / "text").exists() and not list(mounts.runtime.glob("*.disk")))
        assert same_tree(content, directory)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0
    assert mounts.left_behind() == []


def test_journal(mounts: Mounts, flat: Path) -> None:
    """A read-only mount replays nothing and says so; --temp replays it, the image stays as it is."""
    dirty(flat)
    before = sha256_of(flat)
    directory = mounts.directory()
    said = mounts.run("mount", "--files", flat, directory)
    assert said.code == 0
    assert "was not unmounted cleanly" in said.err
    assert "--temp" in said.err
    assert (directory / "text").read_text() == "hello\n"
    mounts.umount(directory)
    directory = mounts.mount(flat, "--files", "--temp")
    assert (directory / "journalled").exists()
    mounts.umount(directory)
    assert sha256_of(flat) == before


@pytest.mark.parametrize("kind", ["ext2", "xfs", "btrfs", "squashfs", "ntfs", "vfat", "iso9660"])
def test_other_file_systems(mounts: Mounts, tmp_path: Path, content: Path, kind: str) -> None:
    """By the kernel, or by a FUSE file system where this kernel does not know it."""
    image = tmp_path / "image.raw"
    make_file_system(image, kind, content)
    directory = mounts.mount(image, "--files")
    names = {path.name.lower() for path in directory.iterdir()}
    if kind in {"squashfs", "iso9660", "ext2", "btrfs"}:
        assert {"text", "below"} <= names
    (entry,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert entry["file_system"] == kind
    mounts.umount(directory)
    wait_for(lambda: not mounts.left_behind())


def test_ten_times(mounts: Mounts, flat: Path) -> None:
    """Over each engine ten times: no process, mount, descriptor, loop device or file is left."""
    directory = mounts.directory()
    temporary = mounts.folder / "temporary"
    temporary.mkdir()
    mounts.environment["TMPDIR"] = str(temporary)
    descriptors = len(os.listdir("/proc/self/fd"))
    for turn in range(10):
        options = ["--files"] if turn % 5 == 0 else []
        assert mounts.run("mount", *options, flat, directory) == Ran(0, "", "")
        mounts.umount(directory)
        assert mounts.left_behind() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert list(temporary.iterdir()) == []


_WITHOUT_NODES = """
mount -t tmpfs none /dev
mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/fuse c 10 229; mknod -m 666 /dev/urandom c 1 9
[ -z "$1" ] || mknod -m 660 /dev/loop-control c 10 237
shift
"$@"
"""


@pytest.mark.parametrize("control", ["", "control"])
def test_without_loop_devices(mounts: Mounts, flat: Path, tmp_path: Path, control: str) -> None:
    """Some containers have no loop-control, others have no nodes for the devices: a FUSE program serves then."""
    directory = mounts.directory()
    enter = ["unshare", "--mount", "--propagation", "unchanged", "bash", "-c", _WITHOUT_NODES, "enter", control]
    look = f"cat {shlex.quote(str(directory))}/text; findmnt -no FSTYPE {shlex.quote(str(directory))}"
    mount = shlex.join([*mounts.command, "mount", "--files", "--engine", mounts.engine, str(flat), str(directory)])
    umount = shlex.join([*mounts.command, "umount", str(directory)])
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *enter, "bash", "-c", f"{mount} && {look} && {umount}"],
        check=False,
        capture_output=True,
        text=True,
        env=mounts.environment,
    )
    assert (done.returncode, done.stdout, without_waiting(done.stderr)) == (0, "hello\nfuse.ext4\n", "")
    xfs = tmp_path / "xfs.raw"
    make_file_system(xfs, "xfs", tmp_path)
    mount = shlex.join([*mounts.command, "mount", "--files", str(xfs), str(directory)])
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *enter, "bash", "-c", mount],
        check=False,
        capture_output=True,
        text=True,
        env=mounts.environment,
    )
    assert done.returncode == 12
    assert done.stderr.startswith(f"tapfs: error: {xfs}: there is no /dev/loop{'-control' if not control else ''}")


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("kind", ["ext4", "ntfs"])
def test_a_signal_loses_nothing_of_what_another_mount_covers(
    mounts: Mounts, tmp_path: Path, content: Path, kind: str
) -> None:
    """Of the kernel's file system, and of a program's."""
    image = tmp_path / "disk.raw"
    make_file_system(image, kind, content)
    directory = mounts.mount(image, "-f", "raw", "--files", "--rw")
    (directory / "new").write_text("written")
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    (listed,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    process = os.pidfd_open(listed["pid"])
    os.kill(listed["pid"], signal.SIGTERM)
    select.select([process], [], [])
    os.close(process)
    for _ in range(2):
        subprocess.run(["umount", directory], check=True)
    checks: dict[str, list[str | Path]] = {"ext4": ["e2fsck", "-f", "-n", image], "ntfs": ["ntfsfix", "-n", image]}
    subprocess.run(checks[kind], check=True, capture_output=True)
    again = mounts.mount(image, "--files")
    assert (again / "new").read_text() == "written"
    mounts.umount(again)


_COVERED = """
mkdir "$1/many"
for each in $(seq 150); do echo $each > "$1/many/$each"; done
exec 7> "$1/held"; echo held >&7
mount -t tmpfs none "$1"
server=$($TAPFS list --json | tr , '\\n' | sed -n 's/ *"pid": //p')
kill -TERM $server
while kill -0 $server 2>/dev/null; do :; done
"""


@pytest.mark.usefixtures("root")
def test_a_signal_has_a_covered_program_write_everything(mounts: Mounts, flat: Path) -> None:
    """fuse2fs keeps folders until it ends, and a mount that another covers cannot be taken away."""
    directory = mounts.directory()
    mount = shlex.join([*mounts.command, "mount", "--files", "--rw", "-f", "raw", str(flat), str(directory)])
    enter = ["unshare", "--mount", "--propagation", "private", "bash", "-ec", _WITHOUT_NODES, "enter", ""]
    environment = mounts.environment | {"TAPFS": shlex.join(mounts.command)}
    done = subprocess.run(
        [*enter, "bash", "-ec", f"{mount}\n{_COVERED}", "covered", str(directory)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    checked = subprocess.run(["e2fsck", "-f", "-n", flat], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    again = mounts.mount(flat, "--files")
    assert (again / "held").read_text() == "held\n"
    assert (again / "many" / "150").read_text() == "150\n"
    mounts.umount(again)
