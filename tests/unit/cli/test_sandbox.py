"""Commands look at images in a sandbox: a driver that is evil on purpose gets nowhere in it, and everywhere without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tapfs.testing.model import MemoryFile
from tests.conftest import Ran
from tests.driver_rows import ROWS
from tests.evil_driver import ATTEMPTS, EvilDriver

Run = Callable[..., Ran]


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[EvilDriver]:
    made = EvilDriver(tmp_path)
    yield made
    made.close()


def run(tapfs_process: Run, evil: EvilDriver, *words: object) -> Ran:
    return tapfs_process(*words, env=os.environ | evil.environment)


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
    ids=lambda value: "-".join(value).replace("/", "") if isinstance(value, list) else "",
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
