"""Whatever a mount and servers leave where others could look has the modes that SECURITY.md promises, for any umask."""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.fuse.conftest import MIB, Mounts, wait_for

#: Type and mode of each thing, by its name, in which N stands for any number. Only its owner reaches "runtime".
PROMISED = {
    "runtime": (stat.S_IFDIR, 0o700),
    "runtime/N.json": (stat.S_IFREG, 0o600),
    "runtime/N.socket": (stat.S_IFSOCK, 0o700),
    "runtime/N.plan": (stat.S_IFREG, 0o600),
    "runtime/served": (stat.S_IFDIR, 0o700),
    "runtime/served/N-N.json": (stat.S_IFREG, 0o600),
    "runtime/served/N-N.socket": (stat.S_IFSOCK, 0o700),
    "server/nbd": (stat.S_IFSOCK, 0o600),
    "server/vhost": (stat.S_IFSOCK, 0o600),
    "server/nbd-pid": (stat.S_IFREG, 0o644),
    "server/vhost-pid": (stat.S_IFREG, 0o644),
    "server/metrics": (stat.S_IFSOCK, 0o600),
    "mount 1": (stat.S_IFDIR, 0o555),
    "mount 1/disk": (stat.S_IFREG, 0o400),
    "mount 1/info.json": (stat.S_IFREG, 0o444),
    "mount 2": (stat.S_IFDIR, 0o555),
    "mount 2/disk": (stat.S_IFREG, 0o600),
    "mount 2/info.json": (stat.S_IFREG, 0o444),
}


@pytest.mark.parametrize("mounts", ["native"], indirect=True)
@pytest.mark.parametrize("umask", [0, 0o022])
def test_the_modes_are_as_promised(mounts: Mounts, tmp_path: Path, umask: int) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    server = tmp_path / "server"
    server.mkdir()
    before = os.umask(umask)
    try:
        directory = mounts.mount(image, "-f", "raw")
        for kind, option in (("nbd", "--socket"), ("vhost", "--vhost-user")):
            words = ["serve", "-f", "raw", image, option, server / kind, "--pid-file", server / f"{kind}-pid"]
            assert _started(mounts, *words, "--background") == Ran(0, "", "")
        # In the foreground the umask is the user's. What is written there has a plan of the next flush.
        written, second = tmp_path / "disk.qcow2", mounts.directory()
        assert mounts.run("create", "-f", "qcow2", written, "4M").code == 0
        foreground = mounts.foreground(written, second, "--rw")
        metrics = mounts.start("stats", "--prometheus", "--listen", server / "metrics")
    finally:
        os.umask(before)
    with foreground, metrics:
        with (second / "disk").open("r+b", buffering=0) as disk:
            disk.write(b"x")
        wait_for(lambda: (server / "metrics").exists() and len(list(mounts.runtime.glob("*.json"))) == 2)
        roots = (mounts.runtime, server, directory, second)
        found = {name: kind for root in roots for name, kind in _modes(tmp_path, root)}
        metrics.terminate()
        mounts.umount(second)
    del found["server"]
    for kind in ("nbd", "vhost"):
        process = os.pidfd_open(int((server / f"{kind}-pid").read_text()))
        signal.pidfd_send_signal(process, signal.SIGTERM)
        select.select([process], [], [])
        os.close(process)
    (mounts.runtime / "served").rmdir()
    mounts.umount(directory)
    assert found == PROMISED


def _started(mounts: Mounts, *words: object) -> Ran:
    """The same as `Mounts.run`, without the addresses that servers print."""
    done = subprocess.run(
        [*mounts.command, *map(str, words)], capture_output=True, text=True, check=False, env=mounts.environment
    )
    return Ran(done.returncode, "", done.stderr)


def _modes(top: Path, root: Path) -> list[tuple[str, tuple[int, int]]]:
    """Type and mode of everything at and below `root`, by names from `top`, their numbers as N."""
    found: list[tuple[str, tuple[int, int]]] = []
    for path in (root, *root.rglob("*")):
        mode = path.lstat().st_mode
        parts = path.relative_to(top).parts
        name = "/".join([*parts[:-1], _without_numbers(parts[-1])]) if parts[0] == "runtime" else "/".join(parts)
        found.append((name, (stat.S_IFMT(mode), stat.S_IMODE(mode))))
    return found


def _without_numbers(name: str) -> str:
    stem, dot, suffix = name.partition(".")
    return "-".join("N" if piece.isdecimal() else piece for piece in stem.split("-")) + dot + suffix
