"""Commands look at images in a sandbox: a driver that is evil on purpose gets nowhere in it, and everywhere without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs.testing.model import MemoryFile
from tests.conftest import Ran
from tests.driver_rows import ROWS
from tests.evil_driver import ATTEMPTS, EvilDriver
from tests.unit.remote.cut_line import nbd_served
from tests.web_server import web_server

Run = Callable[..., Ran]


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[EvilDriver]:
    made = EvilDriver(tmp_path)
    yield made
    made.close()


def run(tapfs_process: Run, evil: EvilDriver, *words: object) -> Ran:
    return tapfs_process(*words, env=os.environ | evil.environment)


def words_of(value: list[str] | set[str]) -> str:
    """The name of a case: its words, without what comes of them."""
    return "-".join(value).replace("/", "") if isinstance(value, list) else ""


@pytest.mark.parametrize(
    ("words", "moments"),
    [
        (["info"], {"probe", "open", "map"}),
        (["map"], {"probe", "open", "map"}),
        (["check"], {"probe", "open", "check"}),
        (["repair"], {"probe", "open", "check"}),
        (["measure", "-O", "qcow2"], {"probe", "open", "map"}),
        (["info", "--backing-root", "/usr"], {"probe", "open", "map"}),
    ],
    ids=words_of,
)
def test_an_evil_driver_gets_nowhere(tapfs_process: Run, evil: EvilDriver, words: list[str], moments: set[str]) -> None:
    ran = run(tapfs_process, evil, *words, evil.image)
    assert evil.done() == {moment: set() for moment in moments}, (ran, evil.results())
    assert all(set(each) == ATTEMPTS for each in evil.results().values())
    assert ran.code == 0, ran.err


def test_it_writes_where_a_command_makes_a_file_and_nowhere_else(
    tapfs_process: Run, evil: EvilDriver, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    ran = run(tapfs_process, evil, "convert", "-O", "qcow2", evil.image, target / "disk.qcow2")
    assert ran == Ran(0, "", "")
    assert evil.done() == {"probe": set(), "open": set(), "map": set()}


def test_without_a_sandbox_it_gets_everywhere(tapfs_process: Run, evil: EvilDriver) -> None:
    assert run(tapfs_process, evil, "check", "--no-sandbox", evil.image).code == 0
    assert evil.done() == dict.fromkeys(("probe", "open", "check"), ATTEMPTS), evil.results()


def test_the_environment_switches_it_off(tapfs_process: Run, evil: EvilDriver) -> None:
    environment = os.environ | evil.environment | {"TAPFS_SANDBOX": "off"}
    assert tapfs_process("check", evil.image, env=environment).code == 0
    assert evil.done()["open"] == ATTEMPTS


@pytest.mark.parametrize("program", ["img2qcow", "qcow2raw"])
def test_the_tools_of_blktap_have_it_too(evil: EvilDriver, tmp_path: Path, program: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    words = [Path(sys.executable).with_name(program), target / "disk", evil.image]
    ran = subprocess.run(words, capture_output=True, check=False, env=os.environ | evil.environment)
    assert ran.returncode != 0  # it is no image of theirs
    assert evil.done() == ({"probe": set()} if program == "img2qcow" else {}), evil.results()


def test_qcow_create_has_it_too(evil: EvilDriver, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    words = [Path(sys.executable).with_name("qcow-create"), "1", target / "disk", evil.image]
    ran = subprocess.run(words, capture_output=True, check=False, env=os.environ | evil.environment)
    assert evil.done()["probe"] == set(), (ran, evil.results())


@pytest.mark.parametrize(
    ("words", "moments"),
    [(["check"], {"probe", "open", "check"}), (["convert", "-O", "qcow2"], {"probe", "open", "map"})],
    ids=["check", "convert"],
)
def test_each_image_of_a_batch_is_looked_at_in_a_sandbox(
    tapfs_process: Run, evil: EvilDriver, tmp_path: Path, words: list[str], moments: set[str]
) -> None:
    """Each has its own: the target of the first line is of no use to the second."""
    target = tmp_path / "target"
    target.mkdir()
    batch = tmp_path / "list"
    converts = words[0] == "convert"
    batch.write_text("".join(f"{evil.image} {target / name if converts else ''}\n" for name in ("one", "two")))
    ran = run(tapfs_process, evil, *words, "--batch", batch, "--jobs", "1", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert [result["error"] for result in json.loads(ran.out)["results"]] == [None, None]
    assert evil.done() == {moment: set() for moment in moments}, evil.results()
    assert all(set(each) == ATTEMPTS for each in evil.results().values())


def test_so_it_is_by_the_workers_of_a_cluster(evil: EvilDriver, tmp_path: Path) -> None:
    """What a thread of a Dask worker does for a task of the scheduler, without either."""
    program = (
        "import sys; from tapfs.many.cluster import _version, run_tasks; from tapfs.many.tasks import Limits;"
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start();"
        "task = {'command': 'check', 'words': ['--json', sys.argv[1]], 'folder': '/'};"
        "print(run_tasks(_version(), 'tapfs.cli.batch_task', Limits(), [task]).answers)"
    )
    words = [sys.executable, "-c", program, evil.image]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | evil.environment)
    assert "'exit_code': 0" in ran.stdout
    assert evil.done() == {"probe": set(), "open": set(), "check": set()}, evil.results()


def test_a_batch_without_a_sandbox_says_so(tapfs_process: Run, evil: EvilDriver, tmp_path: Path) -> None:
    batch = tmp_path / "list"
    batch.write_text(f"{evil.image}\n")
    assert run(tapfs_process, evil, "check", "--no-sandbox", "--batch", batch, "--jobs", "1").code == 0
    assert evil.done()["open"] == ATTEMPTS


@pytest.mark.parametrize(
    ("words", "moments"),
    [
        (["info"], {"probe", "open", "map"}),
        (["convert", "-O", "qcow2"], {"probe", "open", "map"}),
        (["survey", "--jobs", "1"], {"probe", "open"}),
    ],
    ids=["info", "convert", "survey"],
)
def test_what_lies_elsewhere_is_fetched_by_others(
    tapfs_process: Run, evil: EvilDriver, tmp_path: Path, words: list[str], moments: set[str]
) -> None:
    """The process that looks at the image never had the network."""
    target = tmp_path / "target"
    target.mkdir()
    with web_server(evil.image.read_bytes()) as server:
        more = [target / "disk"] if words[0] == "convert" else []
        ran = run(tapfs_process, evil, *words, f"{server.url}/disk.evil", *more)
    assert (ran.code, ran.err) == (0, "")
    assert evil.done() == {moment: set() for moment in moments}, evil.results()
    assert all(set(each) == ATTEMPTS for each in evil.results().values())


def test_a_survey_looks_at_local_images_in_a_sandbox(tapfs_process: Run, evil: EvilDriver) -> None:
    ran = run(tapfs_process, evil, "survey", "--jobs", "1", evil.image)
    assert ran.code == 0, ran.err
    assert evil.done() == {"probe": set(), "open": set()}, evil.results()


def test_a_process_that_fetches_reaches_what_the_user_has_named_and_no_more() -> None:
    """A process that a stranger's image has taken over can ask the starter for more than tapfs would."""
    program = (
        "import sys; from tapfs.host.remote.address import Address;"
        "from tapfs.host.remote.fetching import Fetching; from tapfs.host.remote.options import USUAL;"
        "from tapfs.host.remote.starter import enter_beside; from tapfs.host.sandbox.confinement import Needs;"
        "from tapfs.host.scratch import unnamed_descriptor;"
        "enter_beside(Needs(scratch=True), [sys.argv[1]]); copy = unnamed_descriptor('fetch');"
        "print(Fetching(Address.known(sys.argv[1]), copy, USUAL).facts.size, flush=True);"
        "Fetching(Address.known(sys.argv[2]), copy, USUAL)"
    )
    with web_server(bytes(1000)) as server:
        addresses = [f"{server.url}/folder/disk", f"{server.url}/other"]
        words = [sys.executable, "-c", program, *addresses]
        ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "1000\n"), ran.stderr
    assert "is no place that the user has named" in ran.stderr


def test_so_it_is_of_a_target_elsewhere(tapfs_process: Run, evil: EvilDriver, tmp_path: Path) -> None:
    """What is written there is shown by a process outside as a file, so this one needs no network and no mount."""
    there = tmp_path / "there"
    there.write_bytes(bytes(evil.image.stat().st_size))
    with nbd_served(there) as path:
        ran = run(tapfs_process, evil, "convert", "-O", "raw", evil.image, f"nbd+unix:///disk?socket={path}")
    assert (ran.code, ran.err) == (0, "")
    assert there.read_bytes() == evil.image.read_bytes()
    assert evil.done() == {moment: set() for moment in ("probe", "open", "map")}, evil.results()
    assert all(set(each) == ATTEMPTS for each in evil.results().values())


def test_nothing_is_written_where_the_user_has_named_no_place(tmp_path: Path) -> None:
    program = (
        "import sys; from tapfs.host.remote.address import Address; from tapfs.host.remote.options import USUAL;"
        "from tapfs.host.remote.starter import enter_beside; from tapfs.host.remote.written_file import open_written;"
        "from tapfs.host.sandbox.confinement import Needs; enter_beside(Needs(), [], [sys.argv[1]]);"
        "open_written(Address.known(sys.argv[2]), USUAL)"
    )
    addresses = [f"nbd+unix:///{name}?socket={tmp_path}/socket" for name in ("disk", "other")]
    ran = subprocess.run([sys.executable, "-c", program, *addresses], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "is no place that the user has named to be written" in ran.stderr


@pytest.mark.parametrize("words", [("check", "-r", "all"), ("repair",)], ids=" ".join)
def test_a_repair_may_write_the_image(tapfs_process: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    image = tmp_path / "image"
    assert tapfs_process("create", "-q", "-f", "qcow2", image, "1M").code == 0
    file = MemoryFile(image.read_bytes())
    ROWS["qcow2"].damages["leak"][1](file)
    image.write_bytes(file.data)
    assert tapfs_process("check", image).code == 3
    assert tapfs_process(*words, image).code == 0
    assert tapfs_process("check", image).code == 0


def test_a_packed_image_for_a_pipe_leaves_no_scratch_folder(tapfs_command: list[str], tmp_path: Path) -> None:
    """The image is made in a folder of its own first, which the sandbox has to let it take away, too."""
    disk, image, scratch = tmp_path / "disk", tmp_path / "image", tmp_path / "scratch"
    disk.write_bytes(b"some text of a disk " * 10_000)
    scratch.mkdir()
    words = [*tapfs_command, "convert", "-f", "raw", "-O", "qcow2", "-c", str(disk), "-"]
    with image.open("wb") as out:
        subprocess.run(
            words, stdout=out, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(scratch)}, check=True
        )
    assert list(scratch.iterdir()) == []
    with tapfs.open(image) as opened:
        assert opened.read(0, disk.stat().st_size) == disk.read_bytes()
