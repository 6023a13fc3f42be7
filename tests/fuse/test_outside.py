"""The process outside of a mount's sandbox: it does what the user has said, and nothing else that a server asks for."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.files import program_process
from tapfs.fuse.files.mount_process import FilesWords
from tapfs.fuse.mount_table import mounted_file_systems, top_mount, unmount
from tapfs.fuse.outside import Outside, answer_of, options_of
from tapfs.fuse.registry import MountEntry, Registry
from tapfs.fuse.settings import MountSettings, for_hidden_mount
from tapfs.host.fuse_connection import connect
from tests.fuse.conftest import somebody, wait_for

pytestmark = pytest.mark.usefixtures("root")

#: Its descriptor 1 is now a file in memory, and now a file that it may not read. Words: the name of the one, the other.
_EXCHANGING = """
import os, sys
said, other = os.memfd_create(sys.argv[1]), os.open(sys.argv[2], os.O_PATH)
while True:
    os.dup2(said, 1)
    os.dup2(other, 1)
"""


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    mountpoint = tmp_path / "mount"
    mountpoint.mkdir()
    words = FilesWords("image", str(mountpoint), MountSettings(confined=True), writable=False)
    options = options_of("image", for_hidden_mount(), writable=False)
    made = Outside(str(mountpoint), options, Registry(tmp_path / "runtime"), words)
    made.start()
    yield made
    made.end()
    assert not [each for each in mounted_file_systems() if each.mount_point.startswith(str(tmp_path))]


def test_a_disk_is_hidden_in_one_directory_that_nobody_else_has(outside: Outside, tmp_path: Path) -> None:
    of_others = tmp_path / "runtime" / "7.disk"
    of_others.mkdir()
    with pytest.raises(ImageError) as raised:
        outside.hide(7)
    assert raised.value.kind is ErrorKind.EXISTS
    outside.hide(8)
    outside.hide(9)
    assert sorted(path.name for path in (tmp_path / "runtime").iterdir()) == ["7.disk", "8.disk"]
    os.close(outside.connect())
    outside.unmount(lazy=True)
    assert [path.name for path in (tmp_path / "runtime").iterdir()] == ["7.disk"]


def test_the_hidden_directory_goes_with_a_server_that_never_mounted(outside: Outside, tmp_path: Path) -> None:
    outside.hide(8)
    outside.end()
    assert list((tmp_path / "runtime").iterdir()) == []


def test_a_link_in_the_place_of_the_hidden_directory_is_not_followed(outside: Outside, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    outside.hide(8)
    os.close(outside.connect())
    outside.unmount(lazy=True)
    place = tmp_path / "runtime" / "8.disk"
    place.symlink_to(tmp_path / "victim")
    try:
        with pytest.raises(ImageError) as raised:
            os.close(outside.connect())
        assert raised.value.path == str(place)
        assert str(tmp_path / "victim") not in [each.mount_point for each in mounted_file_systems()]
    finally:
        if top_mount(str(tmp_path / "victim")) is not None:
            unmount(str(tmp_path / "victim"), lazy=True)


def test_a_mount_point_that_is_a_link_is_mounted_on(tmp_path: Path) -> None:
    """The user has named it."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    connection = connect(str(tmp_path / "link"), options_of("image", MountSettings(), writable=False))
    try:
        assert top_mount(str(tmp_path / "there")) is not None
    finally:
        unmount(str(tmp_path / "there"), lazy=True)
        os.close(connection)


@pytest.mark.parametrize(
    "message",
    [
        {"request": "mount files", "type": "tmpfs", "offset": 0, "size": 1 << 20, "remarks": []},
        {"request": "mount files", "type": "nfs", "offset": 0, "size": 1 << 20, "remarks": []},
        {"request": "mount files", "type": "ext4", "offset": "0", "size": -1, "remarks": None},
        {"request": "mount files", "type": ["ext4"]},
        {"request": "type", "node": "../../../etc/passwd"},
        {"request": "type", "node": "/etc/passwd"},
        {"request": program_process.START, "type": "tmpfs", "node": "disk", "why_not_by_kernel": ""},
        {"request": program_process.START, "type": "ext4", "node": "../disk", "why_not_by_kernel": ""},
        {"request": program_process.START},
        {"request": "unmount files", "force": True, "write_back": False},
        {"request": program_process.END, "pid": "1"},
        {"request": program_process.SAID, "pid": "../tmp"},
        {"request": "clear away"},
        {},
    ],
    ids=lambda message: "-".join(map(str, list(message.values())[:2])).replace("/", "_"),
)
def test_what_no_server_of_ours_asks_for_is_refused(
    outside: Outside, tmp_path: Path, message: dict[str, object]
) -> None:
    outside.hide(8)
    (tmp_path / "runtime" / "8.disk" / "disk").write_bytes(bytes(1 << 20))
    with pytest.raises(ImageError):
        outside.ask(message)


def await_mount(answers: socket.socket, mountpoint: str) -> None:
    """Wait until something is mounted. Raises the ImageError that comes before."""
    while top_mount(mountpoint) is None:
        if select.select([answers], [], [], 0.05)[0]:
            answer = answer_of(answers)
            assert "pid" in answer.fields, answer  # of the program, which has not told its end yet
            assert answer.descriptor is not None
            os.close(answer.descriptor)


@pytest.mark.usefixtures("no_new_loop_device")
@pytest.mark.parametrize(
    "message",
    [
        {"request": "mount files", "type": "ext4", "offset": 0, "size": 16 << 20, "remarks": []},
        {"request": "type", "node": "disk"},
        {"request": program_process.START, "type": "ext4", "node": "disk", "why_not_by_kernel": ""},
    ],
    ids=lambda message: str(message["request"]),
)
@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_disk_that_is_no_file_of_its_mount_is_refused(
    outside: Outside, tmp_path: Path, message: dict[str, object], kind: str
) -> None:
    other = tmp_path / "other.img"
    other.touch()
    os.truncate(other, 16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", other], check=True)
    outside.hide(8)
    disk = tmp_path / "runtime" / "8.disk" / "disk"
    if kind == "link":
        disk.symlink_to(other)
    else:
        disk.hardlink_to(other)
    mountpoint = str(tmp_path / "mount")
    try:
        with outside.begin(message) as answers, pytest.raises(ImageError) as raised:
            await_mount(answers, mountpoint)
        assert raised.value.kind is ErrorKind.DENIED
        assert top_mount(mountpoint) is None
    finally:
        if top_mount(mountpoint) is not None:
            unmount(mountpoint, lazy=True)


def test_it_ends_and_hears_no_process_but_its_program(outside: Outside, tmp_path: Path) -> None:
    with somebody() as prey:
        outside.ask({"request": program_process.END, "pid": prey.pid, "force": True})
        assert outside.ask({"request": program_process.SAID, "pid": prey.pid}).descriptor is None
        outside.clear_away(prey.pid)
        assert prey.poll() is None
    assert tmp_path.exists()


@pytest.mark.parametrize("number", ["victim", 7])
def test_a_forged_entry_has_nothing_removed_elsewhere(outside: Outside, tmp_path: Path, number: str | int) -> None:
    victims = [tmp_path / "victim.socket", tmp_path / "victim.json", tmp_path / "runtime" / "7.socket"]
    for victim in victims:
        victim.touch()
    pid = str(tmp_path / number) if isinstance(number, str) else number
    entry = MountEntry("image", "raw", str(tmp_path / "mount"), 7, 1, "ro", "native", "2026-01-01", shows="files")
    (tmp_path / "runtime" / "8.json").write_text(json.dumps(asdict(entry) | {"pid": pid}))
    outside.ask({"request": "clear away", "pid": pid})
    assert [victim for victim in victims if not victim.exists()] == []


def test_a_file_that_takes_the_place_of_what_a_program_said_is_not_given(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    words = FilesWords("image", str(tmp_path), MountSettings(confined=True), writable=False)
    name = program_process._name_of_said(str(tmp_path))  # the server knows it, too
    seen = set()
    with subprocess.Popen([sys.executable, "-c", _EXCHANGING, name, str(secret)], stdout=subprocess.DEVNULL) as evil:
        try:
            wait_for(lambda: "secret" in os.readlink(f"/proc/{evil.pid}/fd/1"))
            for _ in range(5000):
                given = program_process.said_by(evil.pid, words)
                if given is not None:
                    seen.add(os.read(given, 6))
                    os.close(given)
        finally:
            evil.kill()
    assert seen == {b""}


def test_who_stops_waiting_ends_the_work(outside: Outside) -> None:
    """A mount that nobody serves never answers."""
    outside.hide(8)
    connection = outside.connect()
    answers = outside.begin({"request": "look"})
    children = Path(f"/proc/{outside.child}/task/{outside.child}/children")
    wait_for(children.read_text)
    answers.close()
    wait_for(lambda: not children.read_text())
    outside.unmount(lazy=True)
    os.close(connection)
