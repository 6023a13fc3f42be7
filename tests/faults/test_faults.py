"""A sample of the matrix that `make torture` runs: the same seeds every time, every kind of image."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults.interposer import REPOSITORY
from tests.faults.scenes import KINDS


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.faults", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, cwd=REPOSITORY)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("operations", ["--seeds", "1", "--steps", "150"]),
        ("stripes", ["--seeds", "1", "--steps", "80"]),
        ("granules", ["--seeds", "1", "--steps", "50"]),
    ],
)
def test_faults_between_engine_and_host_spoil_nothing(what: str, words: list[str]) -> None:
    done = run("--what", what, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[1] for line in done.stdout.splitlines() if line.startswith(what)} == set(KINDS)


def test_each_call_of_the_engine_fails_once() -> None:
    done = run("--what", "one-by-one", "--only", "raw", "qcow2", "--seeds", "1", "--steps", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("one-by-one qcow2"))
    assert {"write", "cut", "sync", "memory"} <= set(said.replace(",", "").split())


def test_each_allocation_behind_an_entry_of_the_engine_fails_once() -> None:
    done = run("--what", "entries", "--only", "luks", "fuse", "--seeds", "1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_mutated_images_give_only_image_errors() -> None:
    done = run("--what", "mutated", "--seeds", "1", "--steps", "120")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "corrupt" in done.stdout


@pytest.mark.parametrize(
    ("broken", "what", "kind"),
    [
        ("commit-what-failed", "operations", ["--only", "overlay"]),
        ("commit-what-failed", "one-by-one", ["--only", "overlay"]),
        ("forget-a-failed-plan", "operations", ["--only", "qcow"]),
        ("two-fill-one-granule", "stripes", ["--only", "overlay"]),
        ("believe-the-header", "mutated", []),
    ],
)
def test_the_runs_notice_a_broken_tapfs(broken: str, what: str, kind: list[str]) -> None:
    # A race may be lost only now and then: one run in three finds it.
    done = run("--break", broken, "--what", what, *kind, "--seeds", "60", "--steps", "120", "--until-failure")
    assert done.returncode > 0, done.stdout
    assert "FAILED: python -m tests.faults" in done.stdout
