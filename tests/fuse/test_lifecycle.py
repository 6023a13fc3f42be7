"""Mounts begin and end in order: errors, signals, killed processes, unmounting from outside, and nothing left."""

from __future__ import annotations

import base64
import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.fuse.conftest import Mounts, refused, wait_for


def test_paths_of_every_kind(mounts: Mounts, sample: Path, tmp_path: Path) -> None:
    """The names go through mount options, the mount table and JSON."""
    image = tmp_path / "a ,b\\c\n\udcff\u00fc.raw"
    image.write_bytes(sample.read_bytes())
    directory = tmp_path / "d ,e\\f\n\udcff\u00fc"
    directory.mkdir()
    link = tmp_path / "link"
    link.symlink_to(directory)
    assert mounts.run("mount", image.name, "link", cwd=tmp_path) == Ran(0, "", "")
    assert (directory / "disk").read_bytes() == sample.read_bytes()
    (entry,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    names = [base64.b64decode(entry[f"{key}_base64"]) for key in ("image", "mountpoint")]
    assert names == [os.fsencode(image), os.fsencode(directory)]
    assert len(mounts.run("list").out.partition("RAM disks")[0].splitlines()) == 4
    assert mounts.run("umount", "link", cwd=tmp_path) == Ran(0, "", "")


def test_twenty_times(mounts: Mounts, sample: Path) -> None:
    directory = mounts.directory()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert mounts.run("mount", sample, directory) == Ran(0, "", "")
        assert (directory / "disk").stat().st_size == sample.stat().st_size
        assert mounts.run("umount", directory) == Ran(0, "", "")
        assert mounts.left_behind() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_umount_waits_for_the_process(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "1M").code == 0
    for _ in range(3):  # the lock of a writer would refuse the next one
        mounts.umount(mounts.mount(image, "--rw"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_it(mounts: Mounts, sample: Path, number: signal.Signals) -> None:
    mounts.mount(sample)
    (pid,) = mounts.processes()
    os.kill(pid, number)
    wait_for(lambda: not mounts.processes())
    assert mounts.left_behind() == []


def test_sigterm_in_use(mounts: Mounts, tmp_path: Path) -> None:
    """All that was written is in the image; whoever still uses the mount is told by errors."""
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "8M").code == 0
    directory = mounts.mount(image, "--rw")
    (pid,) = mounts.processes()
    script = f"""if True:
        import os
        descriptor = os.open({str(directory / "disk")!r}, os.O_RDWR)
        number = 0
        try:
            while True:
                os.pwrite(descriptor, b"%8d" % number, number % 1000 * 8192)
                number += 1
                print(number, flush=True)
        except OSError:
            pass
    """
    with subprocess.Popen([*mounts.command[:1], "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "1\n"
        os.kill(pid, signal.SIGTERM)
        written = int(writer.stdout.read().split()[-1])
    wait_for(lambda: not mounts.processes())
    assert mounts.left_behind() == []
    assert mounts.run("check", image).code == 0
    read = mounts.mount(image)
    with (read / "disk").open("rb") as disk:
        for number in range(max(0, written - 1000), written):
            disk.seek(number % 1000 * 8192)
            assert int(disk.read(8)) in {number, number + 1000}
    mounts.umount(read)


def test_foreground(mounts: Mounts, sample: Path) -> None:
    directory = mounts.directory()
    process = mounts.foreground(sample, directory)
    wait_for(lambda: mounts.served_by(process.pid))  # it looks at its mount by a process that ends
    assert (directory / "disk").read_bytes() == sample.read_bytes()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0
    assert mounts.left_behind() == []


def test_foreground_ends_with_umount(mounts: Mounts, sample: Path) -> None:
    directory = mounts.directory()
    process = mounts.foreground(sample, directory)
    mounts.umount(directory)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("command", [["umount"], ["umount", "-l"], ["fusermount3", "-u"]])
def test_unmounted_from_outside(mounts: Mounts, tmp_path: Path, command: list[str]) -> None:
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "1M").code == 0
    directory = mounts.mount(image, "--rw")
    with (directory / "disk").open("r+b") as disk:
        disk.write(b"data")
    subprocess.run([*command, directory], check=True)
    wait_for(lambda: not mounts.processes())
    assert mounts.left_behind() == []
    assert mounts.run("check", image).code == 0


def test_killed(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    (pid,) = mounts.processes()
    mounts.kill(pid)
    wait_for(lambda: not mounts.processes())
    (entry,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert not entry["alive"]
    assert f"{pid} (dead)" in mounts.run("list").out
    again = mounts.run("mount", sample, directory)
    assert again.code == 15
    assert "tapfs umount" in again.err
    cleaned = mounts.run("umount", directory)
    assert cleaned == Ran(0, "", f"tapfs: {directory}: process {pid}, which served it, had died; cleaned up\n")
    assert mounts.left_behind() == []
    assert mounts.run("mount", sample, directory).code == 0
    mounts.umount(directory)


def test_killed_and_unmounted_by_hand(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    (pid,) = mounts.processes()
    mounts.kill(pid)
    wait_for(lambda: not mounts.processes())
    subprocess.run(["fusermount3", "-u", "-z", directory], check=True)
    assert json.loads(mounts.run("list", "--json").out)["mounts"] == []
    assert mounts.left_behind() == []


@pytest.mark.parametrize("use", ["open", "directory", "mapped"])
def test_busy_names_the_user(mounts: Mounts, sample: Path, use: str) -> None:
    directory = mounts.mount(sample)
    script = {
        "open": "import sys; f = open('disk'); import os; os.chdir('/')",
        "directory": "",
        "mapped": "import mmap, os; f = open('disk', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ);"
        "f.close(); os.chdir('/')",
    }[use]
    wait = "; print('using', flush=True); input()"
    with subprocess.Popen(
        [*mounts.command[:1], "-c", script + wait if script else wait[2:]],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "using\n"
        busy = mounts.run("umount", directory)
        user.communicate("\n")
    assert busy.code == 15
    assert f"{directory}: is busy: used by process {user.pid} (" in busy.err
    assert busy.err.count("\n") == 1
    mounts.umount(directory)


def test_busy_and_forced(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    descriptor = os.open(directory / "disk", os.O_RDONLY)
    assert mounts.run("umount", directory).code == 15
    assert mounts.run("umount", "--force", directory) == Ran(0, "", "")
    assert mounts.left_behind() == []
    with refused(errno.ENOTCONN):
        os.pread(descriptor, 1, 0)
    with refused(errno.ENOTCONN):
        os.close(descriptor)


def test_umount_twice(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    mounts.umount(directory)
    again = mounts.run("umount", directory)
    assert again == Ran(17, "", f"tapfs: error: {directory}: no image is mounted here\n")


def test_umount_of_what_is_not_ours(mounts: Mounts) -> None:
    refusal = mounts.run("umount", "/proc")
    assert refusal == Ran(17, "", "tapfs: error: /proc: no image is mounted here\n")


@pytest.mark.parametrize(
    "case",
    [
        ("sample", "missing", 17, "No such file"),
        ("sample", "sample", 64, "not a directory"),
        ("sample", "sample/x", 17, "Not a directory"),
        ("sample", "/proc", 18, "is a mount point already"),
        ("missing.qcow", "empty", 17, "missing.qcow"),
        ("corrupt.qcow", "empty", 2, "corrupt.qcow"),
        ("empty", "empty", 11, "is a directory"),
    ],
)
def test_mounting_fails(mounts: Mounts, sample: Path, tmp_path: Path, case: tuple[str, str, int, str]) -> None:
    image, directory, code, words = case
    (tmp_path / "empty").mkdir()
    corrupt = bytearray(64 << 10)
    corrupt[:8] = b"QFI\xfb\x00\x00\x00\x01"
    corrupt[24:33] = (1 << 30).to_bytes(8, "big") + b"\x0c"
    corrupt[33] = 9
    corrupt[40:48] = (1 << 50).to_bytes(8, "big")  # the L1 table far past the end
    (tmp_path / "corrupt.qcow").write_bytes(corrupt)
    (tmp_path / "sample").write_bytes(sample.read_bytes())
    for options in ([], ["--foreground"]):
        failed = mounts.run("mount", *options, tmp_path / image, tmp_path / directory)
        assert failed.code == code
        assert failed.out == ""
        assert failed.err.startswith("tapfs: error: ")
        assert failed.err.count("\n") == 1
        assert words in failed.err
        assert mounts.left_behind() == []


def test_raw_is_not_written_on_a_guess(mounts: Mounts, sample: Path) -> None:
    failed = mounts.run("mount", "--rw", sample, mounts.directory())
    assert failed.code != 0
    assert "-f raw" in failed.err
    assert mounts.left_behind() == []


def test_without_pyfuse3(mounts: Mounts, sample: Path, tmp_path: Path) -> None:
    (tmp_path / "pyfuse3.py").write_text("raise ModuleNotFoundError('pyfuse3')\n")
    mounts.environment["PYTHONPATH"] = str(tmp_path)
    failed = mounts.run("mount", sample, mounts.directory())
    assert failed.code == 12
    assert "apt install fuse3 libfuse3-dev" in failed.err
    assert failed.err.count("\n") == 1


def test_runtime_directory_of_another(mounts: Mounts, sample: Path) -> None:
    mounts.runtime.mkdir(mode=0o755)
    failed = mounts.run("mount", sample, mounts.directory())
    assert failed.code == 19
    assert str(mounts.runtime) in failed.err
    mounts.runtime.chmod(0o700)
    assert mounts.left_behind() == []
