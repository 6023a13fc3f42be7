"""A Ceph cluster of one node, from Debian's packages unpacked into a folder: a monitor, and an OSD in memory.

Nothing is installed and no systemd is asked. The daemons listen on loopback, and end with the cluster.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import uuid
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PACKAGES = ("ceph-mon", "ceph-osd", "ceph-common", "python3-rbd")
#: The interpreter that Debian's Python packages are made for.
_PYTHON = "/usr/bin/python3"
_TRIES = 240

_CONFIGURATION = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}]
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
mon cluster log file = {folder}/cluster.log
osd objectstore = memstore
memstore device bytes = 536870912
osd class load list = *
osd class default list = *
osd class dir = {classes}
erasure code dir = {codes}
plugin dir = {plugins}
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
log file = {folder}/$name.log
log to file = true
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
"""


def unpacked(folder: Path) -> Path:
    """The root of the packages and of what they need that is not installed, fetched unless they are there."""
    root, packages = folder / "root", folder / "packages"
    if (folder / "complete").exists():
        return root
    packages.mkdir(parents=True, exist_ok=True)
    words = ["apt-get", "install", "--simulate", "--no-install-recommends", *PACKAGES]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    wanted = re.findall(r"^Inst (\S+)", said, re.MULTILINE)
    installed = [name for name in PACKAGES if name not in wanted]
    assert not installed, f"{installed} are installed here, and the cluster is to be one of its own"
    subprocess.run(["apt-get", "download", "-q", *wanted], check=True, cwd=packages)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    (folder / "complete").touch()
    return root


class Cluster:
    """A cluster that runs: the environment and the configuration of its clients."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "ceph.conf"
        libraries = root / "usr/lib/x86_64-linux-gnu"
        self.environment = {
            **os.environ,
            "LD_LIBRARY_PATH": f"{libraries}:{libraries / 'ceph'}:{root / 'usr/lib/ceph'}",
            "PATH": f"{root / 'usr/bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(root / "usr/lib/python3/dist-packages"),
            "CEPH_CONF": str(self.configuration),
        }
        self._ceph = root / "usr/bin/ceph"
        with socket.socket() as free:  # the monitor's address is in its map, so it has to be known before it listens
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._places = {
            "classes": next(root.rglob("rados-classes")),
            "codes": next(root.rglob("erasure-code")),
            "plugins": next(root.rglob("compressor")).parent,
        }

    def run(self, *words: str | Path) -> str:
        """What a program of the packages prints."""
        ran = subprocess.run(
            words,
            check=False,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, (words, ran.stdout)
        return ran.stdout

    def ceph(self, *words: str) -> str:
        """What `ceph` says to this cluster."""
        return self.run(_PYTHON, self._ceph, "--connect-timeout", "60", *words)

    def daemon(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """A daemon that stays in front."""
        with (self.folder / f"{words[0]}.out").open("wb") as output:
            return subprocess.Popen(
                [*words, "-f"], env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def describe(self, fsid: str) -> None:
        """Write the configuration."""
        text = _CONFIGURATION.format(fsid=fsid, port=self.port, folder=self.folder, **self._places)
        self.configuration.write_text(text)


@contextmanager
def cluster(root: Path, folder: Path) -> Generator[Cluster]:
    """A cluster with an empty pool "rbd"."""
    made = Cluster(root, folder)
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    for each in ("mon", "osd"):
        (folder / each).mkdir()
    made.describe(fsid)
    named = folder / "monmap"
    made.run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{made.port}]", "--fsid", fsid, named)
    made.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", named)
    with ExitStack() as ended:
        for words in (["ceph-mon", "-i", "a"], ["ceph-osd", "-i", "0"]):
            if words[0] == "ceph-osd":
                assert made.ceph("osd", "new", osd).strip() == "0"
                made.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
            process = made.daemon(words)
            ended.callback(process.wait)
            ended.callback(process.terminate)
        made.ceph("osd", "pool", "create", "rbd", "8")
        for _ in range(_TRIES):
            if "1 up" in made.ceph("osd", "stat"):
                break
        made.run("rbd", "pool", "init", "rbd")
        yield made
