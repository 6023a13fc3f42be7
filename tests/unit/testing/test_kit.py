"""The kit for driver tests: it passes right drivers and finds what is wrong with others."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tapfs.driver import HostFile, OpenRequest, Reservation
from tapfs.errors import ImageError
from tapfs.extent import Extent, Kind
from tapfs.formats.qcow.writer import WritableQcowDriver
from tapfs.formats.qcow2.editable import EditableQcow2Driver
from tapfs.plan import Plan, Write, plan
from tapfs.testing import crash, hostile, operations, resize
from tapfs.testing.__main__ import main
from tapfs.testing.laws import check_map
from tapfs.testing.subject import Subject, ViolationError, subject_named
from tests.conftest import REPOSITORY
from tests.kit_kinds import kinds, resizable_kinds

WRITER = "tapfs.formats.qcow.writer.WritableQcowDriver"


@pytest.mark.parametrize(("name", "options", "overlay"), list(kinds()))
def test_our_drivers_pass(name: str, options: dict[str, str], overlay: bool) -> None:  # noqa: FBT001
    subject = subject_named(name, options=options, overlay=overlay)
    assert subject.writable
    assert operations.run(subject, 0, 40) == "40 requests"
    assert crash.crash_often(subject, 0, 10).crashes >= 10  # more where a replay is cut off, too
    assert hostile.run(subject, 0, 60) == "60 images"


@pytest.mark.parametrize(("name", "options", "overlay"), list(resizable_kinds()))
def test_our_disks_get_other_sizes(name: str, options: dict[str, str], overlay: bool) -> None:  # noqa: FBT001
    subject = subject_named(name, size=300_000 // 512 * 512, options=options, overlay=overlay)
    assert resize.run(subject, 0, 4) == "4 sizes"


def test_a_growth_that_is_cut_off_leaves_no_corruption() -> None:
    """A fixed VHDX has a new block in its table before the disk is longer: part `crash`, 1796010009."""
    subject = subject_named("vhdx", size=300_032, options={"subformat": "fixed", "block_size": "1048576"})
    assert resize.run(subject, 13, 4) == "4 sizes"


def test_a_size_of_parts_of_sectors_may_be_refused() -> None:
    subject = subject_named("luks", size=300_032, options={"iter-time": "1"})
    assert resize.run(subject, 1, 1) == "1 sizes"


def test_bytes_of_a_longer_parent_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapfs.testing.resize._zero_behind", lambda *_: None)
    with pytest.raises(ViolationError, match="does not read as zeros"):
        resize.run(subject_named("qcow2", size=300_032, overlay=True), 0, 12)


def test_a_size_that_is_told_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EditableQcow2Driver.make_room

    def early(driver: EditableQcow2Driver, size: int) -> Iterator[Plan]:
        yield plan([Write(0, 24, size.to_bytes(8, "big"))])
        yield from right(driver, size)

    monkeypatch.setattr(EditableQcow2Driver, "make_room", early)
    with pytest.raises((ViolationError, ImageError)):
        resize.run(subject_named("qcow2", size=300_032, options={"cluster_size": "512"}), 0, 12)


def run_often(suite: Callable[[Subject, int, int], str], amount: int) -> None:
    for seed in range(10):
        suite(subject_named("qcow"), seed, amount)


def test_a_lost_write_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{WRITER}.commit", lambda *_: None)
    with pytest.raises(ViolationError, match="reads otherwise"):
        operations.run(subject_named("qcow"), 0, 40)


def test_a_plan_that_a_failed_flush_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[[object], Plan] = WritableQcowDriver.flush

    def forgets(driver: WritableQcowDriver) -> Plan:
        plan = right(driver)
        driver.flushed(plan)
        return plan

    monkeypatch.setattr(f"{WRITER}.flush", forgets)
    with pytest.raises(ViolationError):
        run_often(operations.run, 60)


def test_a_wrong_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WritableQcowDriver.flush
    monkeypatch.setattr(f"{WRITER}.flush", lambda driver: Plan(tuple(reversed(right(driver).stages))))
    with pytest.raises(ViolationError, match="after a crash in epoch"):
        run_often(crash.run, 30)


def test_the_life_of_an_image_that_says_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("begin", "end"):
        monkeypatch.setattr(f"{WRITER}.{name}", lambda _, name=name: calls.append(name) or Plan(), raising=False)
    for name in ("reserve", "__init__"):
        right: Callable[..., object] = getattr(WritableQcowDriver, name)
        monkeypatch.setattr(
            f"{WRITER}.{name}",
            lambda *given, name=name, right=right: (calls.append(name), right(*given))[1],
        )
    run_often(operations.run, 20)
    # Opened, perhaps written once it has begun, and perhaps ended in good order.
    assert re.fullmatch(r"(__init__ (begin (reserve )*(end )?)?)+", " ".join(calls) + " ")
    assert {"begin", "end"} <= set(calls)


def test_a_reservation_of_which_a_range_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WritableQcowDriver.commit

    def forgetful(driver: WritableQcowDriver, reservation: Reservation) -> None:
        kept = reservation.placements[:1] if len(reservation.ranges) > 1 else reservation.placements
        object.__setattr__(reservation, "placements", kept)
        right(driver, reservation)

    monkeypatch.setattr(f"{WRITER}.commit", forgetful)
    with pytest.raises(ViolationError, match=r"reads otherwise|left something else"):
        run_often(operations.run, 60)


class Careless:
    """A format that believes its header."""

    name = "careless"

    def probe(self, _head: bytes, _size: int) -> int:
        return 0

    def open(self, file: HostFile, request: OpenRequest) -> object:
        struct.unpack(">Q", file.read(struct.unpack(">H", file.read(0, 2))[0], 8))
        return subject_named("raw").format.open(file, request)


def test_an_exception_that_is_no_image_error_is_found() -> None:
    careless = Subject(Careless(), images=[bytes(64)])  # type: ignore[arg-type]
    with pytest.raises(ViolationError, match="error, which is no ImageError"):
        hostile.run(careless, 0, 60)


class Endless(Careless):
    """A format that looks at as many blocks as the header says."""

    def open(self, file: HostFile, request: OpenRequest) -> object:
        while request is not None:
            file.size()
        return file


def test_an_image_that_takes_for_ever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "IMAGE_SECONDS", 0.05)
    endless = Subject(Endless(), images=[bytes(64)])  # type: ignore[arg-type]
    with pytest.raises(
        ViolationError, match=r"image 0 takes more than 0\.05 s of processor time, and is at .*\.py:\d+: "
    ):
        hostile.run(endless, 0, 60)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


class Maps:
    """A driver of a disk of four granules whose map is what the test says."""

    def __init__(self, *extents: Extent) -> None:
        self.extents = list(extents)
        self.geometry = (
            subject_named("qcow", options={"cluster_size": "4096"})
            .disk(subject_named("qcow", size=16384, options={"cluster_size": "4096"}).new_file(), b"")
            .driver.geometry
        )

    def map(self, _offset: int, _length: int) -> list[Extent]:
        return self.extents


@pytest.mark.parametrize(
    ("extents", "message"),
    [
        ([], "is empty"),
        ([Extent(4096, 12288, Kind.ZERO)], "begins at 4096"),
        ([Extent(0, 8192, Kind.ZERO)], "ends at 8192"),
        ([Extent(0, 8192, Kind.ZERO), Extent(8192, 8192, Kind.ZERO)], "are one"),
        ([Extent(0, 4096, Kind.ZERO), Extent(8192, 8192, Kind.DATA)], "4096 is followed by 8192"),
        ([Extent(0, 1 << 30, Kind.ZERO)], "past the last granule"),
        ([Extent(0, 4096, Kind.COMPRESSED), Extent(4096, 12288, Kind.ZERO)], "has no payload"),
        ([Extent(0, 16384, Kind.DATA, host_offset=-1)], "is at -1"),
    ],
)
def test_the_laws_of_maps(extents: list[Extent], message: str) -> None:
    with pytest.raises(ViolationError, match=re.escape(message)):
        check_map(Maps(*extents), 0, 16384)  # type: ignore[arg-type]


def write_guide(folder: Path) -> None:
    """The modules that formats/README.md shows, and what pip would leave of a package that registers the second."""
    guide = (REPOSITORY / "formats/README.md").read_text(encoding="utf-8")
    codes = [block for block in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL) if "FORMAT = " in block]
    for name, code in zip(("tapfs_toy", "tapfs_toy_writer"), codes, strict=True):
        (folder / f"{name}.py").write_text(code)
    package = folder / "tapfs_toy-0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tapfs-toy\nVersion: 0.1\n")
    (package / "entry_points.txt").write_text("[tapfs.formats]\ntoy = tapfs_toy_writer:FORMAT\n")


def test_the_written_driver_of_the_guide_passes_by_its_entry_point(tmp_path: Path) -> None:
    """A stranger's package outside the repository: the kit, and the commands, know its format by its name."""
    write_guide(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        return done.stdout

    said = run("tapfs.testing", "toy", "--seeds", "2")
    for line in ("operations 1: 60 requests", "crash 1: 30 crashes", "hostile 1: 200 images"):
        assert line in said
    (tmp_path / "disk.raw").write_bytes(b"guest" * 40_000)
    run("tapfs.cli", "convert", "-q", "--no-sandbox", "-f", "raw", "-O", "toy", "disk.raw", "disk.toy")
    assert "toy" in run("tapfs.cli", "info", "--no-sandbox", "disk.toy")
    run("tapfs.cli", "compare", "--no-sandbox", "-f", "toy", "-F", "raw", "disk.toy", "disk.raw")


@pytest.mark.parametrize(
    ("line", "broken", "said"),
    [
        ("create_options = {}", "options = {}", "the format has create and lacks create_options"),
        (
            "def abort(",
            "def aborted(",
            "the driver has reserve, commit, unflushed_bytes, flush, flushed and lacks abort",
        ),
        ("def details(", "def detail(", "the driver has format_name, geometry, map and lacks details"),
    ],
)
def test_what_a_driver_lacks_is_named(line: str, broken: str, said: str, tmp_path: Path) -> None:
    """A protocol with a part missing would count as one that is not there, and its suites would be left out."""
    write_guide(tmp_path)
    for name in ("tapfs_toy", "tapfs_toy_writer"):
        path = tmp_path / f"{name}.py"
        path.write_text(path.read_text().replace(line, broken))
    command = [sys.executable, "-m", "tapfs.testing", "tapfs_toy_writer:FORMAT", "--seeds", "1", "--suite", "resize"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "contract: FAILED: the " in done.stdout
    assert said in done.stdout


def test_the_written_driver_of_the_guide_names_what_a_full_host_has_no_space_for(tmp_path: Path) -> None:
    """Its table begins in the page of the header. Who follows it with a table elsewhere has the space, too."""
    write_guide(tmp_path)
    for name in ("tapfs_toy", "tapfs_toy_writer"):
        path = tmp_path / f"{name}.py"
        path.write_text(path.read_text().replace("12 + 8 *", "4096 + 8 *"))
    command = [
        sys.executable,
        "-m",
        "tapfs.testing",
        "tapfs_toy_writer:FORMAT",
        "--seeds",
        "1",
        "--suite",
        "operations",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(path.read_text().replace(", metadata=tuple(entries)", ""))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no `Reservation.metadata` has named what the plan writes at host offset 4096 of file 0" in done.stdout


def test_the_driver_of_the_guide_passes(tmp_path: Path) -> None:
    """The whole format that formats/README.md shows, by its module, with an image made by hand."""
    write_guide(tmp_path)
    image = tmp_path / "disk.toy"
    image.write_bytes(struct.pack(">4sQ", b"TOY1", 3 * 65536) + struct.pack(">3Q", 65536, 0, 131072) + bytes(196608))
    command = [sys.executable, "-m", "tapfs.testing", "tapfs_toy:FORMAT", "--image", image, "--seeds", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "hostile 1: 200 images" in done.stdout
    assert "crash: left out" in done.stdout


def test_the_command_names_what_fails_and_the_words_that_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    words = ["qcow", "--suite", "operations", "--seeds", "1", "--option", "cluster_size=4096"]
    assert main(words) == 0
    monkeypatch.setattr(f"{WRITER}.commit", lambda *_: None)
    assert main(words) == 1
    out, _ = capsys.readouterr()
    assert "FAILED: after" in out
    assert "--suite operations --first-seed 0 --seeds 1" in out
    with pytest.raises(SystemExit):
        main(["no-such-format"])
