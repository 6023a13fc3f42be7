"""The runtime directory, also where a user is root in a namespace of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tapfs.serving import runtime_directory
from tests.unit.host.other_user import OTHER_USER

#: The script becomes the other user, and then root in a user namespace, as `unshare -Ur` does.
_INSIDE = """
import ctypes, os, sys
sys.path[:] = {path!r}
from tapfs.serving.runtime_directory import make_private, runtime_directories, runtime_directory
os.setgroups([]); os.setgid({user}); os.setuid({user})
print(runtime_directory())
libc = ctypes.CDLL(None)
assert libc.prctl(4, 1, 0, 0, 0) == 0 and libc.unshare(0x10000000) == 0
for name, text in (("setgroups", "deny"), ("uid_map", "0 {user} 1"), ("gid_map", "0 {user} 1")):
    open(f"/proc/self/{{name}}", "w").write(text)
assert os.geteuid() == 0
print(runtime_directory())
print(runtime_directories()[0] == runtime_directory())
make_private(runtime_directory())
print(os.path.isdir(runtime_directory()))
"""


@pytest.mark.parametrize("place", ["session", "tmp"])
def test_root_of_a_namespace_uses_the_user_s_own(sticky: Path, place: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("RUNTIME_DIR")}
    expected = Path("/tmp", f"tapfs-{OTHER_USER}")  # noqa: S108  what others have there stays
    if place == "session":
        os.chown(sticky, OTHER_USER, OTHER_USER)
        environment["XDG_RUNTIME_DIR"] = str(sticky)
        expected = sticky / "tapfs"
    script = _INSIDE.format(path=sys.path, user=OTHER_USER)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [str(expected), str(expected), "True", "True"]


def test_root_of_the_host_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAPFS_RUNTIME_DIR", raising=False)
    assert os.geteuid() == 0
    assert runtime_directory.runtime_directory() == Path("/run/tapfs")
