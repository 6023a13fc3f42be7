"""A writer that is killed: its plan log and the file as the host has it give all that it had acknowledged."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapfs
from tapfs import ErrorKind, Image, ImageError
from tapfs.disk.chain import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.disk.plan_log import PlanLog, PlannedFile, merged_additions
from tapfs.kernel.engine import EngineDisk, HostDescriptor, execute_on_files
from tapfs.plan import Allocate, Copy, Discard, Grow, Plan, Shorten, Step, Write

SIZE = 3 << 20
SECTOR = 512
PASSWORD = b"word"

STEPS = st.one_of(
    st.builds(Write, st.just(0), st.integers(0, 1 << 62), st.binary(max_size=40)),
    st.builds(Grow, st.just(0), st.integers(0, 1 << 62)),
    st.builds(Copy, st.just(0), *(st.integers(0, 1 << 62) for _ in range(3))),
    st.builds(Shorten, st.just(0), st.integers(0, 1 << 62)),
    st.builds(Allocate, st.just(0), st.integers(0, 1 << 62), st.integers(0, 1 << 62)),
    st.builds(Discard, st.just(0), st.integers(0, 1 << 62), st.integers(0, 1 << 62)),
)
FILES = [
    PlannedFile("/images/top", (1, 2)),
    PlannedFile("/images/a b", (1, 3)),
    PlannedFile("/images/\udcff", (2, 2)),
]
OPTIONS = {
    "blktap": {"blktap": "on"},
    "qcow2": {"cluster_size": "4096"},
    "qcow2 with narrow tables": {"cluster_size": "512", "refcount_bits": "64"},
    "qcow2 with subclusters": {"cluster_size": "16384", "extended_l2": "on"},
}
PLANS = st.builds(Plan, st.lists(st.lists(STEPS, min_size=1).map(tuple), min_size=1).map(tuple), st.just(""))


def plan_left(log: PlanLog, image: Image) -> Plan | None:
    """The plan that a process left for the one file of an image."""
    kept = log.kept()
    return kept.plan if kept is not None and kept.is_for([image.layers[0].file.identity]) else None


@given(plans=st.lists(PLANS, min_size=1, max_size=4))
@settings(deadline=None, max_examples=20)
def test_the_last_plan_is_the_one_that_is_kept(tmp_path_factory: pytest.TempPathFactory, plans: list[Plan]) -> None:
    path = tmp_path_factory.mktemp("log") / "1.plan"
    log = PlanLog(path, "token")
    for plan in plans:
        log.keep(plan, FILES)
        kept = PlanLog(path, "token").kept()
        assert kept is not None
        assert (kept.plan, kept.further_paths) == (plan, ("/images/a b", "/images/\udcff"))
        assert kept.is_for([(1, 2), (1, 3), (2, 2)])
        assert not kept.is_for([(1, 2), (1, 3), (2, 3)])
        assert not kept.is_for([(1, 2), (2, 2), (1, 3)])
        assert not kept.is_for([(1, 2)])
    assert PlanLog(path, "other").kept() is None
    log.clear()
    assert PlanLog(path, "token").kept() is None
    log.close()
    assert list(path.parent.iterdir()) == []


def addition(rng: random.Random) -> Plan:
    """Two stages, of growth and of writes that overlap often."""
    grow = tuple(Grow(0, rng.randrange(200)) for _ in range(rng.randrange(2)))
    writes = tuple(Write(rng.randrange(2), rng.randrange(90), rng.randbytes(rng.randrange(1, 30))) for _ in range(3))
    return Plan((grow, () if rng.random() < 0.2 else writes))


def laid_out(steps: Sequence[Step]) -> tuple[bytes, bytes]:
    """What writes leave in two files."""
    files = bytearray(120), bytearray(120)
    for step in steps:
        if isinstance(step, Write):
            files[step.file][step.host_offset : step.host_offset + len(step.data)] = step.data
    return bytes(files[0]), bytes(files[1])


@pytest.mark.parametrize("seed", range(20))
def test_additions_are_merged_stage_by_stage(seed: int) -> None:
    rng = random.Random(seed)
    added = [addition(rng) for _ in range(rng.randrange(1, 12))]
    for stage in merged_additions(added).stages:
        writes = [step for step in stage if isinstance(step, Write)]
        places = [
            (step.file, at) for step in writes for at in range(step.host_offset, step.host_offset + len(step.data))
        ]
        assert len(places) == len(set(places)), "two writes of a stage overlap, and any of them may be the last"
        sizes = [step.size for each in added for step in each.stages[0] if isinstance(step, Grow)]
        assert [step.size for step in stage if isinstance(step, Grow)] == ([] if writes else [max(sizes)])
        if writes:
            assert laid_out(stage) == laid_out([step for each in added for step in each.stages[1]])


def test_an_addition_that_a_kill_tore_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever bytes of it are there; and additions to a plan before are none to the plan that took its place."""
    monkeypatch.setattr("tapfs.disk.plan_log._MIN_ROOM", 2048)
    rng = random.Random(1)
    path = tmp_path / "1.plan"
    log = PlanLog(path, "token")
    assert not log.add(addition(rng))
    plan = Plan(((Write(0, 1000, b"base"),),))
    for _ in range(3):  # the third is where the first one was, and its additions still lie behind it
        log.keep(plan, FILES[:1])
        right = [list(merged_additions([]).stages)]
        added: list[Plan] = []
        for _ in range(2):
            before = path.read_bytes()
            added.append(addition(rng))
            assert log.add(added[-1])
            after = path.read_bytes()
            right.append(list(merged_additions(added).stages))
            written = [at for at, byte in enumerate(after) if byte != before[at]]
            for cut in range(written[0], written[-1] + 1):
                for torn in (after[:cut] + before[cut:], before[: cut + 1] + after[cut + 1 :]):
                    (tmp_path / "torn").write_bytes(torn)
                    kept = PlanLog(tmp_path / "torn", "token").kept()
                    assert kept is not None
                    assert torn == after or list(kept.plan.stages) == [*plan.stages, *right[-2]]
            kept = PlanLog(path, "token").kept()
            assert kept is not None
            assert list(kept.plan.stages) == [*plan.stages, *right[-1]]
    log.remove()


def test_additions_end_where_the_room_does(tmp_path: Path) -> None:
    log = PlanLog(tmp_path / "1.plan", "token")
    log.keep(Plan(((Grow(0, 1),),)), FILES[:1])
    count = 0
    while log.add(Plan(((Write(0, 4096 * count, bytes([count % 251]) * 4096),),))):
        count += 1
    assert count > 50
    kept = PlanLog(tmp_path / "1.plan", "token").kept()
    assert kept is not None
    assert len(kept.plan.stages[1]) == count
    log.clear()
    assert not log.add(Plan(((Grow(0, 2),),)))
    log.close()


def test_a_plan_may_be_of_any_length(tmp_path: Path) -> None:
    log = PlanLog(tmp_path / "1.plan", "token")
    for length in (1, 1 << 18, 1 << 20, 5):
        plan = Plan(((Write(0, 0, bytes([length % 251]) * length),),))
        log.keep(plan, FILES[:1])
        kept = PlanLog(tmp_path / "1.plan", "token").kept()
        assert kept is not None
        assert kept.plan == plan
    log.close()  # with a plan in it the file stays
    again = PlanLog(tmp_path / "1.plan", "token").kept()
    assert again is not None
    assert again.plan == plan
    log.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\1", b"\1" * 5000, b"\7" + bytes(1 << 20), b"\1" + bytes(1 << 20)])
def test_a_file_that_is_no_plan_log(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "1.plan").write_bytes(content)
    assert PlanLog(tmp_path / "1.plan", "token").kept() is None
    with pytest.raises(ImageError) as raised:
        PlanLog(tmp_path / "nowhere" / "1.plan", "token").keep(Plan(((Grow(0, 1),),)), FILES[:1])
    assert raised.value.kind is ErrorKind.NOT_FOUND


class Killed:
    """A disk, what it holds, and copies of its files as a kill at some moments would have left them."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path, self.plan_path, self._left = folder / "disk", folder / "1.plan", folder / "left"
        self.format = "qcow2" if kind.startswith("qcow2") else "qcow"
        self.password = PASSWORD if kind == "encrypted" else None
        backing = folder / "base.raw" if kind == "overlay" else None
        self.content = bytearray(SIZE)
        if backing is not None:
            self.content[:] = random.Random(1).randbytes(SIZE)
            backing.write_bytes(self.content)
        tapfs.create(
            str(self.path),
            self.format,
            SIZE,
            backing=None if backing is None else str(backing),
            backing_format=None if backing is None else "raw",
            options=OPTIONS.get(kind, {}),
            password=self.password,
        )
        self.image = self._open()
        self.checked = 0
        self.checking = False

    def _open(self, plan_log: PlanLog | None = None) -> Image:
        log = PlanLog(self.plan_path, "token") if plan_log is None else plan_log
        options = OpenOptions(format=self.format, writable=True, backing_formats=("raw",))
        return open_image(str(self.path), options, password=self.password, plan_log=log)

    def write(self, offset: int, data: bytes) -> None:
        # It may flush when it has written.
        self.content[offset : offset + len(data)] = data
        self.image.write(offset, data)

    def write_zeroes(self, offset: int, length: int) -> None:
        # It works through the range piece by piece.
        offset, length = offset - offset % 4096, -(-length // 4096) * 4096
        self.image.write_zeroes(offset, length)
        self.content[offset : offset + length] = bytes(length)

    def check_kill_now(self) -> None:
        """A successor finds what is in `content`."""
        self.checked += 1
        self.checking = True
        left = self._left
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
        shutil.copy(self.path, left / "disk")
        if self.plan_path.exists():
            shutil.copy(self.plan_path, left / "1.plan")
        plan = plan_left(PlanLog(left / "1.plan", "token"), self.image)
        if plan is not None:
            with (left / "disk").open("r+b") as file:
                execute_on_files([HostDescriptor(file.fileno(), "left", writable=True)], plan)
        options = OpenOptions(format=self.format, backing_formats=("raw",))
        with open_image(str(left / "disk"), options, password=self.password) as opened:
            found = opened.read(0, SIZE)
        assert found == self.content, next(at for at in range(SIZE) if found[at] != self.content[at])
        assert tapfs.check(left / "disk", format=self.format).corruptions == 0
        self.checking = False


def interrupt_flushes(monkeypatch: pytest.MonkeyPatch, disk: Callable[[], Killed]) -> None:
    """Look what a kill would leave before a plan is executed, after each of its stages, and after all of it."""
    whole = EngineDisk.execute

    def execute(engine: EngineDisk, plan: Plan) -> None:
        # A successor's own execution is not interrupted.
        for stages in range(0 if disk().checking else len(plan.stages) + 1):
            whole(engine, Plan(plan.stages[:stages]))
            disk().check_kill_now()
        whole(engine, plan)

    monkeypatch.setattr(EngineDisk, "execute", execute)


@pytest.mark.parametrize(
    "kind", ["plain", "overlay", "encrypted", "blktap", *(kind for kind in OPTIONS if "qcow2" in kind)]
)
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int) -> None:
    disk = Killed(tmp_path, kind)
    rng = random.Random(f"{kind} {seed}")
    interrupt_flushes(monkeypatch, lambda: disk)
    for _ in range(30):
        sectors = rng.choice((1, 3, 8, 64))
        sector = rng.randrange(SIZE // SECTOR - sectors)
        data = rng.randbytes(sectors * SECTOR)
        if rng.random() < 0.2:
            disk.write_zeroes(sector * SECTOR, len(data))
        else:
            disk.write(sector * SECTOR, data)
        if rng.random() < 0.3:
            disk.check_kill_now()
        if rng.random() < 0.15:
            disk.image.flush()
    disk.check_kill_now()
    # The successor goes on with what there is.
    disk.image.abandon()
    disk.checking = True
    plan = plan_left(PlanLog(disk.plan_path, "token"), disk.image)
    if plan is not None:
        with disk.path.open("r+b") as file:
            execute_on_files([HostDescriptor(file.fileno(), "left", writable=True)], plan)
    disk.checking = False
    disk.image = disk._open()
    disk.write(0, b"again" * 200)
    disk.check_kill_now()
    disk.image.close()
    assert disk.checked > 10


class CountingLog(PlanLog):
    """How often the whole plan was kept."""

    kept_whole = 0

    def keep(self, plan: Plan, files: Sequence[PlannedFile]) -> None:
        self.kept_whole += 1
        super().keep(plan, files)


@pytest.mark.parametrize("kind", ["plain", "qcow2"])
def test_a_write_adds_to_the_plan_that_is_kept(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapfs.disk.write_path._MIN_KEEP_COST_SECONDS", 1e9)
    disk = Killed(tmp_path, kind)
    disk.image.close()
    log = CountingLog(disk.plan_path, "token")
    disk.image = disk._open(log)
    places = random.Random(kind).sample(range(SIZE // 4096), 200)
    for place in places:
        disk.write(place * 4096, place.to_bytes(2, "big") * 2048)
    assert log.kept_whole == 1, "only the first write has no plan before it"
    disk.check_kill_now()
    disk.image.flush()
    assert log.kept_whole == 2
    for place in places[:50]:  # of an image without room for more: written in place, and then zeros, which free
        disk.write(place * 4096, b"again" * 100)
    disk.write_zeroes(places[0] * 4096, 4096)
    disk.write(places[0] * 4096, b"and again")
    disk.check_kill_now()
    disk.image.close()


class FailingLog(PlanLog):
    """No room on the host's memory file system."""

    failing = False

    def keep(self, plan: Plan, files: Sequence[PlannedFile]) -> None:
        if self.failing:
            raise ImageError(ErrorKind.NO_SPACE, "no room for the plan")
        super().keep(plan, files)

    def add(self, added: Plan) -> bool:
        return not self.failing and super().add(added)


def test_a_plan_that_cannot_be_kept_is_an_error_of_the_write(tmp_path: Path) -> None:
    disk = Killed(tmp_path, "plain")
    disk.image.close()
    log = FailingLog(disk.plan_path, "token")
    disk.image = disk._open(log)
    disk.image.write(0, b"a" * 4096)
    log.failing = True
    with pytest.raises(ImageError) as raised:
        disk.image.write(1 << 20, b"b" * 4096)
    assert raised.value.kind is ErrorKind.NO_SPACE
    log.failing = False
    disk.image.write(2 << 20, b"c" * 4096)
    # What failed may be there or not; all else is.
    disk.content[:4096], disk.content[2 << 20 : (2 << 20) + 4096] = b"a" * 4096, b"c" * 4096
    disk.content[1 << 20 : (1 << 20) + 4096] = disk.image.read(1 << 20, 4096)
    disk.check_kill_now()
    disk.image.close()


def test_raw_images_need_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(SIZE))
    log = PlanLog(tmp_path / "1.plan", "token")
    with open_image(str(path), OpenOptions(format="raw", writable=True), plan_log=log) as disk:
        disk.write(0, b"a")
        disk.flush()
    assert not log.exists
