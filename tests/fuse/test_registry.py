"""The registry of mounts: alive or dead, ours or not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.registry import MountEntry, Registry, all_mounts, find_mount
from tapfs.serving import runtime_directory as places
from tapfs.serving.processes import process_start
from tapfs.serving.runtime_directory import runtime_directories, runtime_directory


def entry_of(pid: int, start: int, mountpoint: str = "/nowhere") -> MountEntry:
    return MountEntry("image", "raw", mountpoint, pid, start, "ro", "pyfuse3", "2026-01-01T00:00:00.000+00:00")


def test_living_and_dead(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "run")
    own = process_start(os.getpid())
    assert own is not None
    registry.add(entry_of(os.getpid(), own))
    with subprocess.Popen(["true"]) as ended:
        pass
    registry.add(entry_of(ended.pid, 1))
    (tmp_path / "run" / f"{ended.pid}.socket").touch()
    (tmp_path / "run" / "other.json").write_text("[]")
    assert registry.entries() == [entry_of(os.getpid(), own)]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [f"{os.getpid()}.json", "other.json"]
    assert registry.find("/nowhere") == entry_of(os.getpid(), own)
    assert registry.find("/elsewhere") is None


def test_number_used_again(tmp_path: Path) -> None:
    """A process of the same number that started at another time is another process."""
    own = process_start(os.getpid())
    assert own is not None
    assert not entry_of(os.getpid(), own - 1).alive
    registry = Registry(tmp_path / "run")
    registry.add(entry_of(os.getpid(), own - 1))
    assert registry.entries() == []


def test_zombie_is_dead() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert process_start(process.pid) is None
    finally:
        process.wait()


@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_directory_that_is_not_private(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "run"
    if kind == "open to others":
        directory.mkdir(mode=0o755)
    elif kind == "link":
        (tmp_path / "other").mkdir(mode=0o700)
        directory.symlink_to(tmp_path / "other")
    else:
        directory.touch()
    with pytest.raises(ImageError) as caught:
        Registry(directory)
    assert caught.value.kind is ErrorKind.DENIED


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "chosen"))
    assert Registry().directory == tmp_path / "chosen"
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", "")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # of another user
    assert runtime_directory() == Path("/tmp/tapfs-12345")  # noqa: S108
    monkeypatch.undo()
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", "")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid or 0)
    expected = Path("/run/tapfs") if os.geteuid() == 0 else tmp_path / "tapfs"
    assert runtime_directory() == expected


def test_the_other_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process of the same user left elsewhere is found; what others put there is not looked at."""
    owner = tmp_path.stat().st_uid or 1000
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", "")
    monkeypatch.setattr(places, "_SESSION", str(tmp_path / "session-{}" / "tapfs"))
    monkeypatch.setattr(places, "_WITHOUT_SESSION", str(tmp_path / "tmp-{}"))
    session, without = tmp_path / f"session-{owner}" / "tapfs", tmp_path / f"tmp-{owner}"
    session.parent.mkdir()
    os.chown(session.parent, owner, -1)
    assert runtime_directories() == [without]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session.parent))
    assert runtime_directories() == [session]
    for directory in (session, without):
        directory.mkdir(mode=0o700)
        os.chown(directory, owner, -1)
    assert runtime_directories() == [session, without]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_directories() == [without, session]
    session.chmod(0o750)
    assert runtime_directories() == [without]
    session.chmod(0o700)
    os.chown(session, owner + 1, -1)
    assert runtime_directories() == [without]
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "chosen"))
    assert runtime_directories() == [tmp_path / "chosen"]


def test_all_registries_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories = [tmp_path / "one", tmp_path / "two"]
    monkeypatch.setattr("tapfs.fuse.registry.runtime_directories", lambda: directories)
    own = process_start(os.getpid())
    assert own is not None
    for directory, place in zip(directories, ("/here", "/there"), strict=True):
        Registry(directory).add(entry_of(os.getpid(), own, place))
    assert [(registry.directory.name, entry.mountpoint) for registry, entry in all_mounts()] == [
        ("one", "/here"),
        ("two", "/there"),
    ]
    found = find_mount("/there")
    assert found is not None
    assert (found[0].directory, found[1].mountpoint) == (directories[1], "/there")
    assert find_mount("/elsewhere") is None
