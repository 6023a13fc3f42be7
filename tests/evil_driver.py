"""A driver that is evil on purpose: whatever calls it, it tries what code of a stranger would try.

It comes in by entry point, as every driver of another package. What came of each attempt it writes into memory that the
interpreter has mapped before tapfs began (a `sitecustomize`), for that is the one thing that no sandbox takes away.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

#: What it tries at each moment.
ATTEMPTS = frozenset(
    {
        *("read a secret", "read elsewhere", "write beside", "overwrite beside", "change a mode", "use the network"),
        *("connect to a socket", "execute", "fork", "trace the parent", "signal another", "new namespace", "mount"),
    }
)

_REPORT_BYTES = 1 << 20

_SITE = """
import mmap, os
with open(os.environ["EVIL_REPORT"], "r+b") as file:
    EVIL_REPORT = mmap.mmap(file.fileno(), 0)
"""

_DRIVER = """
import ctypes, json, os, signal, socket, subprocess
import sitecustomize
from tapfs.formats.raw import RawDriver
from tapfs.driver import Ability, Geometry

HEAD = b"evil"
TARGET = json.loads(os.environ["EVIL_TARGET"])
libc = ctypes.CDLL(None, use_errno=True)
done = set()

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")

def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

def connect():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(TARGET["socket"])

def network():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", 9))

def trace():
    checked(libc.ptrace(0x4206, TARGET["process"], None, None))
    libc.ptrace(0x4207, TARGET["process"], None, None)
    os.waitpid(TARGET["process"], 0x40000000)
    libc.ptrace(17, TARGET["process"], None, None)

def write(path, mode):
    with open(path, mode) as file:
        file.write("evil")

ATTEMPTS = {
    "read a secret": lambda: open("/etc/shadow").read(),
    "read elsewhere": lambda: open(TARGET["elsewhere"]).read(),
    "write beside": lambda: write(TARGET["folder"] + "/new", "w"),
    "overwrite beside": lambda: write(TARGET["beside"], "r+"),
    "change a mode": lambda: os.chmod(TARGET["beside"], 0o777),
    "use the network": network,
    "connect to a socket": connect,
    "execute": lambda: subprocess.run(["/bin/true"], check=True),
    "fork": fork,
    "trace the parent": trace,
    "signal another": lambda: os.kill(TARGET["process"], signal.SIGCONT),
    "new namespace": lambda: checked(libc.unshare(0x04000000)),
    "mount": lambda: checked(libc.mount(b"none", TARGET["folder"].encode(), b"tmpfs", 0, None)),
}

def attempt(moment):
    if (moment, os.getpid()) in done:
        return
    done.add((moment, os.getpid()))
    results = {}
    # An unshared mount namespace would be another place than that which is looked at: last.
    for name in sorted(ATTEMPTS, key=lambda name: name in ("mount", "new namespace")):
        if name in TARGET["spared"]:
            continue
        try:
            ATTEMPTS[name]()
            results[name] = "done"
        except Exception as error:
            results[name] = type(error).__name__
    libc.umount2(TARGET["folder"].encode(), 2)
    line = json.dumps([moment, os.getpid(), results]).encode() + b"\\n"
    report = sitecustomize.EVIL_REPORT
    report.seek(bytes(report).find(b"\\0"))
    report.write(line)

class EvilDriver(RawDriver):
    def __init__(self, file, name):
        super().__init__(file, name)
        self.geometry = Geometry(virtual_size=file.size(), granule=512, map_unit=1 << 16)

    def map(self, offset, length):
        attempt("map")
        return super().map(offset, length)

    def check(self, progress=None):
        from tapfs.findings import CheckReport
        attempt("check")
        return CheckReport()

    def repair(self):
        return []

class Evil:
    name = "evil"
    abilities = frozenset({Ability.WRITE})

    def probe(self, head, size):
        attempt("probe")
        return 90 if head.startswith(HEAD) else 0

    def open(self, file, request):
        attempt("open")
        return EvilDriver(file, self.name)

FORMAT = Evil()
"""


class EvilDriver:
    """The driver installed for processes that are started with `environment`, an `image` of its format, its prey."""

    def __init__(self, folder: Path, *, spared: frozenset[str] = frozenset()) -> None:
        site = folder / "site"
        package = site / "evil-1.0.dist-info"
        package.mkdir(parents=True)
        (package / "entry_points.txt").write_text("[tapfs.formats]\nevil = evil:FORMAT\n")
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
        (site / "evil.py").write_text(_DRIVER)
        (site / "sitecustomize.py").write_text(_SITE)
        self._report = folder / "report"
        self._report.write_bytes(bytes(_REPORT_BYTES))
        images, elsewhere = folder / "images", folder / "elsewhere"
        images.mkdir()
        elsewhere.mkdir()
        self.image = images / "disk.evil"
        self.image.write_bytes(b"evil" + os.urandom((1 << 20) - 4))
        (images / "beside").write_text("mine")
        (elsewhere / "secret").write_text("mine")
        self._prey = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], env={})
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen(16)
        self._listener.setblocking(False)
        self.environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
            "EVIL_REPORT": str(self._report),
            "EVIL_TARGET": json.dumps(
                {
                    "folder": str(images),
                    "beside": str(images / "beside"),
                    "elsewhere": str(elsewhere / "secret"),
                    "socket": str(folder / "socket"),
                    "process": self._prey.pid,
                    "spared": sorted(spared),
                }
            ),
        }

    def close(self) -> None:
        """End what it was to harm."""
        self._prey.kill()
        self._prey.wait()
        self._listener.close()

    def results(self, pid: int | None = None) -> dict[str, dict[str, str]]:
        """What came of each attempt (of the process `pid`), "done" or the error, by the moment at which it was made."""
        lines = map(json.loads, self._report.read_bytes().rstrip(b"\0").splitlines())
        return {moment: results for moment, process, results in lines if pid in (None, process)}

    def done(self, pid: int | None = None) -> dict[str, set[str]]:
        """The attempts that succeeded, by the moment."""
        found = self.results(pid).items()
        return {moment: {name for name, how in each.items() if how == "done"} for moment, each in found}
