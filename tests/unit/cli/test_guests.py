"""The commands about guests' disks: without Xen one line and an exit code, and what they make of their options."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapfs.errors import CODES, EXIT_USAGE, ErrorKind, ImageError

Run = Callable[..., Any]

NAMED = ("--domain", "3", "--vdev", "xvda")
ON_XEN = [
    ("attach", "disk.qcow", *NAMED),
    ("attach", "tap:qcow:disk.qcow,xvda,w", "--domain", "guest", "--nice", "5", "--memory", "64M", "--no-wait"),
    ("detach", *NAMED, "--force"),
    ("stats", *NAMED, "--json"),
    ("pause", *NAMED),
    ("resume", *NAMED),
    ("swap", *NAMED, "overlay.qcow"),
    ("commit", *NAMED),
    ("mirror", *NAMED, "copy.qcow2", "-O", "qcow2", "--pivot"),
    ("resize", *NAMED),
    ("resize", *NAMED, "10G"),
    ("limit", *NAMED, "--bytes", "10M"),
    ("blktapctrl",),
    ("blktapctrl", "-v"),
]


@pytest.fixture
def no_xen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that runs no Xen, wherever the tests run."""

    def find_host() -> None:
        raise ImageError(ErrorKind.UNSUPPORTED, "this machine does not run Xen")

    monkeypatch.setattr("tapfs.xen.host.find_host", find_host)
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.mark.usefixtures("no_xen")
@pytest.mark.parametrize("words", ON_XEN, ids=" ".join)
def test_without_xen_it_says_so(tapfs: Run, words: tuple[str, ...]) -> None:
    code, out, err = tapfs(*words)
    assert code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert err == "tapfs: error: this machine does not run Xen\n"
    assert ("unsupported" in out) if "--json" in words else out == ""


@pytest.mark.parametrize("words", ON_XEN, ids=" ".join)
def test_without_xen_nothing_heavy_is_loaded(words: tuple[str, ...]) -> None:
    script = (
        "import sys\nsys.modules['trio'] = None\nfrom tapfs.xen import host\nfrom tapfs.errors import *\n"
        "def find_host():\n    raise ImageError(ErrorKind.UNSUPPORTED, 'no Xen')\nhost.find_host = find_host\n"
        f"from tapfs.cli.main import main\nsys.exit(main({list(words)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (12, "tapfs: error: no Xen\n")


def test_without_ublk_it_names_what_needs_none(tapfs: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tapfs.ublk.driver.CONTROL", tmp_path / "ublk-control")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = tapfs("attach", "--ublk", "disk.qcow2")
    assert (code, out) == (CODES[ErrorKind.UNSUPPORTED].exit_code, "")
    assert err.count("\n") == 1
    assert "'tapfs mount'" in err
    assert "'tapfs serve'" in err


@pytest.mark.parametrize("command", ["detach", "pause", "resume", "stats"])
def test_a_block_device_that_is_not_there_is_named(
    tapfs: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path))
    code, _, err = tapfs(command, "--ublk", "/dev/ublkb77")
    assert code == CODES[ErrorKind.NOT_FOUND].exit_code
    assert "/dev/ublkb77" in err
    assert tapfs(command, "--ublk", "/dev/sda")[0] == CODES[ErrorKind.INVALID_ARGUMENT].exit_code


@pytest.mark.usefixtures("no_xen")
def test_stats_need_no_xen(tapfs: Run) -> None:
    assert json.loads(tapfs("stats", "--json").out) == []
    code, out, err = tapfs("stats")
    assert (code, len(out.splitlines()), err) == (0, 1, "")


@pytest.mark.usefixtures("no_xen")
def test_list_without_xen_is_what_it_was(tapfs: Run) -> None:
    code, out, err = tapfs("list", "--json")
    assert (code, err) == (0, "")
    assert set(json.loads(out)) == {"version", "mounts", "ram_disks"}


@pytest.mark.parametrize(
    "words",
    [
        ("attach",),
        ("attach", "disk.qcow", "--vdev", "xvda"),
        ("attach", "disk.qcow", *NAMED, "--mode", "rx"),
        ("attach", "disk.qcow", *NAMED, "--nice", "20"),
        ("attach", "disk.qcow", *NAMED, "--open-files", "0"),
        ("attach", "disk.qcow", *NAMED, "--memory", "much"),
        ("attach", "disk.qcow", *NAMED, "--limit-requests", "-1"),
        ("attach", "disk.qcow", "--ublk", *NAMED),
        ("attach", "disk.qcow", *NAMED, "--queues", "2"),
        ("attach", "disk.qcow", "--ublk", "--queues", "0"),
        ("attach", "disk.qcow", "--ublk", "--grants", "map"),
        ("detach",),
        ("detach", "--ublk", "0", *NAMED),
        ("swap", "--ublk", "0", "--all", "snapshot"),
        ("detach", "--vdev", "xvda"),
        ("detach", "--domain", "3"),
        ("stats", "--domain", "3"),
        ("stats", "--vdev", "xvda"),
        ("stats", "--interval", "0"),
        ("stats", "--interval", "nan"),
        ("swap", *NAMED),
        ("commit",),
        ("commit", "disk.qcow", *NAMED),
        ("commit", *NAMED, "-d"),
        ("commit", "disk.qcow", "--keep-names"),
        ("mirror", *NAMED, "copy"),
        ("mirror", *NAMED, "copy", "-O", "raw", "--keep-names"),
        ("resize", *NAMED, "-5"),
        ("limit", *NAMED),
        ("limit", *NAMED, "--requests", "-1"),
        ("limit", *NAMED, "--bytes", "x"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_line_and_64(tapfs: Run, words: tuple[str, ...]) -> None:
    code, out, err = tapfs(*words)
    assert code == EXIT_USAGE
    assert out == ""
    assert re.fullmatch(r"tapfs: error: .+; see 'tapfs [a-z]+ --help'\n", err)


def test_an_installation_for_a_package(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/block-tapfs").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    code, out, err = tapfs("blktapctrl", "--install", tmp_path / "root")
    assert (code, err) == (0, "")
    assert [Path(line).name for line in out.splitlines()] == ["tapfs-blktapctrl.service", "block-tapfs"]
    assert all(Path(line).is_relative_to(tmp_path / "root") for line in out.splitlines())
