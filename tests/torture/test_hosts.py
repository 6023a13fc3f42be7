"""Commands on other hosts: a sample of the part `hosts` of `make torture`, and what it would notice."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.torture import commands, hosts
from tests.torture.calls import Ended
from tests.torture.commands import Command


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("nothing", "create-vhdx"),
        ("full-16", "create-vhdx"),
        ("read-only", "resize-vdi"),
        ("clock-jumps", "resize-vdi"),
    ],
)
def test_a_sample(host: str, name: str, tmp_path: Path) -> None:
    assert hosts.judge(host, name, tmp_path).counts == {"commands on other hosts": 1}


def _said(host: str, program: str) -> str:
    words = [sys.executable, str(hosts.REFUSING), host, sys.executable, "-S", "-c", program]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def test_a_host_refuses_what_it_lacks_and_nothing_else(tmp_path: Path) -> None:
    program = f"""
import errno, os
try:
    print(os.close(os.open({str(tmp_path)!r}, os.O_TMPFILE | os.O_RDWR)))
except OSError as error:
    print(errno.errorcode[error.errno])
print(os.close(os.open({str(tmp_path / "named")!r}, os.O_CREAT | os.O_RDWR)))
"""
    assert _said("no-tmpfile", program) == "ENOTSUP\nNone"
    assert _said("no-punch", program) == "None\nNone"


def _leaves(folder: Path, *, target: bytes, status: int) -> list[str]:
    program = f"import sys\nopen({str(folder / 'target')!r}, 'wb').write({target!r})\nsys.exit({status})"
    return [sys.executable, "-S", "-c", program]


@pytest.mark.parametrize(("host", "status"), [("no-punch", 1), ("read-only", 0), ("full-0", 77)])
def test_a_program_that_fails_for_nothing_or_says_nothing_is_noticed(
    host: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(folder: Path, ended: Ended) -> None:
        del folder, ended

    command = Command(lambda _: None, partial(_leaves, target=b"", status=status), look)
    monkeypatch.setitem(commands.COMMANDS, "wrong", command)
    with pytest.raises(AssertionError):
        hosts.judge(host, "wrong", tmp_path)
