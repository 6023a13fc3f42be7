"""Images of several host files: opened under one gate, locked, mapped, written, planned, created and replaced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, Gate, ImageError
from tapfs.disk import probe
from tapfs.disk.chain import OpenOptions, open_layers
from tapfs.disk.opening import complete_left, open_image
from tapfs.disk.plan_log import PlanLog, PlannedFile
from tapfs.disk.plugins import Plugin
from tapfs.host.location import locate
from tapfs.host.new_files import NewFiles
from tapfs.host.target import Target
from tapfs.jobs.convert import convert_to_new
from tapfs.jobs.create import NewImage
from tapfs.kernel.engine import EngineDisk
from tapfs.plan import Plan, Write, plan
from tests.flat_images import COUNTER_AT, FORMAT, MAGIC

MIB = 1 << 20


@pytest.fixture(autouse=True)
def flat_format(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy format is installed, as another package would have it."""
    found = {"flat": Plugin(FORMAT, "the toy")}
    monkeypatch.setattr(probe, "_others", lambda: found)
    probe.format_named.cache_clear()
    yield
    probe.format_named.cache_clear()


def image(folder: Path, *lines: str) -> Path:
    path = folder / "disk.flat"
    path.write_bytes((MAGIC + "".join(line + "\n" for line in lines).encode()).ljust(COUNTER_AT + 8, b"\0"))
    return path


def extent(folder: Path, name: str, letter: bytes, length: int = MIB) -> Path:
    path = folder / name
    path.write_bytes(letter * length)
    return path


def failure(path: Path, **options: object) -> ImageError:
    with pytest.raises(ImageError) as raised:
        tapfs.open(path, **options)  # type: ignore[arg-type]
    return raised.value


def test_read_from_three_files(tmp_path: Path) -> None:
    for name, letter in (("a.bin", b"a"), ("b.bin", b"b"), ("c.bin", b"c")):
        extent(tmp_path, name, letter)
    path = image(tmp_path, f"{MIB} rw 0 a.bin", "4096 rw 8192 b.bin", f"{MIB} ro 0 c.bin")
    with tapfs.open(path) as disk:
        assert disk.size == 2 * MIB + 4096
        assert disk.read(MIB - 2, 4100) == b"aa" + b"b" * 4096 + b"cc"
        places = [(run.offset, run.length, run.host_path, run.host_offset) for run in disk.extents()]
        assert places == [
            (0, MIB, str(tmp_path / "a.bin"), 0),
            (MIB, 4096, str(tmp_path / "b.bin"), 8192),
            (MIB + 4096, MIB, str(tmp_path / "c.bin"), 0),
        ]
        assert disk.allocated_bytes >= 3 * MIB
        assert disk.whole_file() is None
        assert disk.info["files"] == [str(path), *(str(tmp_path / f"{letter}.bin") for letter in "abc")]


def test_writes_reach_their_files_and_a_plan_reaches_all(tmp_path: Path) -> None:
    for name, letter in (("a.bin", b"a"), ("b.bin", b"b"), ("c.bin", b"c"), ("log", b"")):
        extent(tmp_path, name, letter)
    path = image(tmp_path, f"{MIB} rw 0 a.bin", f"{MIB} rw 0 b.bin", f"{MIB} ro 0 c.bin", "0 log 0 log")
    with tapfs.open(path, writable=True) as disk:
        disk.write(MIB - 3, b"......")
        with pytest.raises(ImageError) as raised:
            disk.write(2 * MIB, b"x")
        assert raised.value.kind is ErrorKind.READ_ONLY
        disk.write_zeroes(0, 512)
        disk.flush()
        assert (tmp_path / "log").read_bytes() == (1).to_bytes(8, "big")
        assert not os.access(f"/proc/self/fd/{disk.layers[0].files[3].descriptor}", os.F_OK) or (
            not disk.layers[0].files[3].writable
        )
    assert (tmp_path / "a.bin").read_bytes() == bytes(512) + b"a" * (MIB - 515) + b"..."
    assert (tmp_path / "b.bin").read_bytes()[:4] == b"...b"
    assert (tmp_path / "c.bin").read_bytes() == b"c" * MIB


def test_a_missing_file_is_named_with_the_image(tmp_path: Path) -> None:
    extent(tmp_path, "a.bin", b"a")
    error = failure(image(tmp_path, f"{MIB} rw 0 a.bin", f"{MIB} rw 0 gone.bin"))
    assert error.kind is ErrorKind.NOT_FOUND
    assert str(error).startswith(f"{tmp_path / 'disk.flat'}: its file gone.bin is missing; put it beside the image")
    with tapfs.open(tmp_path / "a.bin", format="raw", writable=True):
        pass  # the failed opening holds no lock


def test_one_file_under_two_names_is_opened_once(tmp_path: Path) -> None:
    extent(tmp_path, "a.bin", b"a")
    (tmp_path / "again.bin").symlink_to("a.bin")
    os.link(tmp_path / "a.bin", tmp_path / "hard.bin")
    path = image(tmp_path, "4096 rw 0 a.bin", "4096 rw 4096 again.bin", "4096 rw 8192 hard.bin", "4096 rw 0 a.bin")
    with tapfs.open(path, writable=True) as disk:
        assert len(disk.layers[0].files) == 2
        disk.write(0, b"1" * 4096 + b"2" * 4096 + b"3" * 4096)
        assert disk.read(12288, 4) == b"1111"
    assert (tmp_path / "a.bin").read_bytes()[:12288] == b"1" * 4096 + b"2" * 4096 + b"3" * 4096


def test_one_file_to_be_written_and_not_to_be_is_refused(tmp_path: Path) -> None:
    extent(tmp_path, "a.bin", b"a")
    path = image(tmp_path, "4096 ro 0 a.bin", "4096 rw 4096 a.bin")
    assert failure(path, writable=True).kind is ErrorKind.CORRUPT
    tapfs.open(path).close()


def test_a_file_outside_the_folder_is_refused_until_told(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    secret = extent(outside, "secret", b"s")
    (inside / "link.bin").symlink_to("../out/secret")
    for name in (str(secret), "../out/secret", "link.bin", "../out/nothing"):
        path = image(inside, f"{MIB} rw 0 {name}")
        error = failure(path)
        assert error.kind is ErrorKind.DENIED
        assert "lies outside the folder of the image" in str(error)
        assert failure(path, backing_root=str(inside)).kind is ErrorKind.DENIED
        assert failure(path, gate=Gate.nothing()).kind is ErrorKind.DENIED
    with tapfs.open(image(inside, f"{MIB} rw 0 {secret}"), gate=Gate.inside(tmp_path)) as disk:
        assert disk.read(0, 4) == b"ssss"
    with tapfs.open(image(inside, f"{MIB} rw 0 link.bin"), gate=Gate.inside(inside, outside)) as disk:
        assert disk.read(0, 4) == b"ssss"


def test_what_is_no_file_is_not_even_opened(tmp_path: Path) -> None:
    """A fifo's writer would go on if its name were opened in the ordinary way."""
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    error = failure(image(tmp_path, "4096 rw 0 fifo"))
    assert error.kind is ErrorKind.INVALID_FORMAT
    assert "is a fifo" in str(error)
    os.close(reader)
    with pytest.raises(OSError, match="No such device"):
        os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK)  # nobody reads


def test_further_files_are_locked(tmp_path: Path) -> None:
    extent(tmp_path, "a.bin", b"a")
    extent(tmp_path, "c.bin", b"c")
    path = image(tmp_path, f"{MIB} rw 0 a.bin", f"{MIB} ro 0 c.bin")
    with tapfs.open(path, writable=True):
        assert failure(tmp_path / "a.bin", format="raw").kind is ErrorKind.LOCKED
        tapfs.open(tmp_path / "c.bin", format="raw").close()
        assert failure(tmp_path / "c.bin", format="raw", writable=True).kind is ErrorKind.LOCKED


def test_a_parent_that_is_a_file_of_its_child_is_a_loop(tmp_path: Path) -> None:
    extent(tmp_path, "a.bin", b"a")
    error = failure(image(tmp_path, f"{MIB} rw 0 a.bin", "parent a.bin"))
    assert error.kind is ErrorKind.CORRUPT
    assert "comes back to this file" in str(error)


def test_created_and_converted_whole(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(os.urandom(3 * MIB))
    with tapfs.open(source, format="raw") as disk:
        convert_to_new(disk, str(tmp_path / "x.flat"), NewImage("flat", 3 * MIB, options={"extents": "3"}))
    names = {"source.raw", "x.flat", "x-0.bin", "x-1.bin", "x-2.bin", "x.log"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with tapfs.open(tmp_path / "x.flat", writable=True) as disk:
        assert disk.read(0, 3 * MIB) == source.read_bytes()
    pieces = b"".join((tmp_path / f"x-{i}.bin").read_bytes() for i in range(3))
    assert pieces == source.read_bytes()


def test_an_existing_further_file_stays(tmp_path: Path) -> None:
    extent(tmp_path, "x-1.bin", b"p")
    with pytest.raises(ImageError) as raised:
        tapfs.create(str(tmp_path / "x.flat"), "flat", 2 * MIB, options={"extents": "2"})
    assert raised.value.kind is ErrorKind.EXISTS
    assert [path.name for path in tmp_path.iterdir()] == ["x-1.bin"]
    tapfs.create(str(tmp_path / "x.flat"), "flat", 2 * MIB, options={"extents": "2"}, overwrite=True)
    with tapfs.open(tmp_path / "x.flat") as disk:
        assert disk.read(MIB, 4) == bytes(4)


def test_a_name_that_is_taken_meanwhile_takes_the_others_back(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(Target(locate(str(tmp_path / "x"))))
        targets = [image, *(stack.enter_context(image.beside(name)) for name in ("y", "z"))]
        new = stack.enter_context(NewFiles(targets, [None, None, None]))
        for file in new.open():
            file.close()
        (tmp_path / "x").write_bytes(b"another's")
        with pytest.raises(ImageError) as raised:
            new.publish(overwrite=False)
    assert raised.value.kind is ErrorKind.EXISTS
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"another's")]


def test_a_replaced_image_is_never_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new further files have names only while the old image has none."""
    tapfs.create(str(tmp_path / "x.flat"), "flat", MIB)
    seen: list[set[str]] = []
    rename = os.rename

    def watched(source: str, target: str, **folders: int) -> None:
        rename(source, target, **folders)
        seen.append({path.name for path in tmp_path.iterdir() if not path.name.startswith(".")})

    monkeypatch.setattr(os, "rename", watched)
    tapfs.create(str(tmp_path / "x.flat"), "flat", MIB, overwrite=True)
    assert [("x.flat" in names) for names in seen] == [False, False]
    assert (tmp_path / "x.flat").exists()


def test_a_plan_that_was_left_reaches_every_file(tmp_path: Path) -> None:
    for name in ("a.bin", "log"):
        extent(tmp_path, name, b"a", 512)
    path = image(tmp_path, "512 rw 0 a.bin", "0 log 0 log")
    options = OpenOptions(writable=True, format="flat")
    left: Plan = plan([Write(2, 0, b"planned!")], [Write(1, 3, b"data"), Write(0, COUNTER_AT, b"counter!")])
    layers = open_layers(str(path), options)
    planned = [PlannedFile(file.real_path(), file.identity) for file in layers[0].files]
    for layer in layers:
        layer.close()
    log = PlanLog(tmp_path / "1.plan", "token")
    log.keep(left, planned)
    assert complete_left(str(path), options, PlanLog(tmp_path / "1.plan", "token"))
    assert (tmp_path / "log").read_bytes()[:8] == b"planned!"
    assert (tmp_path / "a.bin").read_bytes()[:8] == b"aaadataa"
    assert path.read_bytes()[COUNTER_AT:] == b"counter!"
    # Another file in the place of one of them: the plan is not for it.
    log = PlanLog(tmp_path / "1.plan", "token")
    log.keep(left, planned)
    extent(tmp_path, "new", b"n", 512).replace(tmp_path / "a.bin")
    assert not complete_left(str(path), options, PlanLog(tmp_path / "1.plan", "token"))
    assert (tmp_path / "a.bin").read_bytes() == b"n" * 512


def test_the_plan_of_a_killed_writer_names_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.bin", "log"):
        extent(tmp_path, name, b"a", 512)
    path = image(tmp_path, "512 rw 0 a.bin", "0 log 0 log")
    plan_log = PlanLog(tmp_path / "1.plan", "token")
    disk = open_image(str(path), OpenOptions(writable=True), plan_log=plan_log)
    disk.write(0, b"x")

    def die(*_: object) -> None:
        raise ImageError(ErrorKind.IO, "killed")

    monkeypatch.setattr(EngineDisk, "execute", die)
    with pytest.raises(ImageError, match="killed"):
        disk.flush()
    monkeypatch.undo()
    disk.abandon()
    kept = PlanLog(tmp_path / "1.plan", "token").kept()
    assert kept is not None
    assert kept.further_paths == (str(tmp_path / "a.bin"), str(tmp_path / "log"))
    with monkeypatch.context() as again:
        again.setattr(probe, "_others", lambda: {"flat": FORMAT})
        assert complete_left(str(path), OpenOptions(writable=True), PlanLog(tmp_path / "1.plan", "token"))
    assert (tmp_path / "log").read_bytes()[:8] == (1).to_bytes(8, "big")


def test_a_disk_inside_the_image_is_chosen_at_open(tmp_path: Path) -> None:
    extent(tmp_path, "a.bin", b"a")
    extent(tmp_path, "b.bin", b"b")
    path = str(image(tmp_path, f"{MIB} rw 0 a.bin", "snapshot monday", f"{MIB} rw 0 b.bin", "4096 ro 0 a.bin"))
    with open_image(path, OpenOptions(snapshot="monday")) as disk, tapfs.open(path) as current:
        assert (disk.size, current.size) == (MIB + 4096, MIB)
        assert disk.read(MIB - 1, 2) + current.read(0, 1) == b"baa"
    for options, kind in (
        (OpenOptions(snapshot="tuesday"), ErrorKind.NOT_FOUND),
        (OpenOptions(snapshot="monday", writable=True), ErrorKind.READ_ONLY),
        (OpenOptions(snapshot="monday", format="raw"), ErrorKind.UNSUPPORTED),
    ):
        with pytest.raises(ImageError) as raised:
            open_image(path, options)
        assert raised.value.kind is kind
