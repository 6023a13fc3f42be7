"""Every command line of the guides runs, in the order of its page, on images that are prepared for the page."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Ran
from tests.unit.guides.guide_commands import Command, commands, pages
from tests.unit.guides.prepared import PREPARE, STAND_FOR

Run = Callable[..., Ran]

#: Folders of the host that are folders of the sandbox here.
_FOLDERS = re.compile(r"(?<![\w./-])/(mnt|tmp|srv|fast)(?=/)")

#: What only a shell does.
_OF_A_SHELL = re.compile(r"[|<>&;$*`]")

#: Commands that leave a process behind, so that they are not run in this one.
_WITH_PROCESSES = {"mount", "umount", "serve", "attach", "detach", "list", "stats"}


class Sandbox:
    """A folder in which the command lines of one page run one after the other."""

    def __init__(self, folder: Path, run_here: Run) -> None:
        self._folder = folder
        self._run_here = run_here
        self._servers: list[tuple[int, subprocess.Popen[str]]] = []
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = os.environ | {"PATH": path, "TMPDIR": str(folder), "TAPFS_RUNTIME_DIR": str(folder / "run")}

    def run(self, command: Command, text: str) -> None:
        """Run one line. Fails with the place of the line.

        A server in the foreground ends before the next line of its block; behind its block others use it.
        """
        for block, server in self._servers:
            if block == command.block:
                end(server)
        text = _FOLDERS.sub(rf"{self._folder}/\1", text)
        place = f"{command.page}:{command.line}: {text}"
        words = shlex.split(text, comments=True)
        if words[0] == "tapfs" and words[1] == "serve" and "--background" not in words:
            server = subprocess.Popen(words, env=self._environment, stdout=subprocess.PIPE, text=True)
            self._servers.append((command.block, server))
            assert server.stdout is not None
            assert server.stdout.readline(), place
        elif words[0] == "tapfs" and words[1] not in _WITH_PROCESSES and not _OF_A_SHELL.search(" ".join(words)):
            ran = self._run_here(*words[1:])
            assert ran.code == 0, f"{place}: {ran.code}: {ran.err}"
        else:
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", text],
                env=self._environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{place}: {done.returncode}: {done.stderr}"

    def close(self) -> None:
        """Unmount what the page leaves mounted, and end the servers."""
        for line in Path("/proc/mounts").read_text().splitlines():
            directory = line.split()[1]
            if directory.startswith(f"{self._folder}/"):
                subprocess.run(["tapfs", "umount", directory], env=self._environment, check=True)
        for _, server in self._servers:
            end(server)


def end(server: subprocess.Popen[str]) -> None:
    """End a server as Ctrl-C does; it may have ended before."""
    assert server.stdout is not None
    if not server.stdout.closed:
        server.send_signal(signal.SIGINT)
        server.communicate()


@pytest.fixture
def sandbox(tmp_path: Path, tapfs: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    for name in ("mnt/image", "mnt/files", "mnt/disk", "mnt/as", "mnt/fs", "tmp", "srv", "fast", "bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "run"))
    opened = Sandbox(tmp_path, tapfs)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "page",
    [page for page in pages() if any(each.reason is None for each in commands(page))],
    ids=lambda page: page.name,
)
def test_every_command_of_a_page_runs(page: Path, sandbox: Sandbox) -> None:
    name = str(page.relative_to(REPOSITORY))
    PREPARE[name]()
    for command in commands(page):
        if command.reason is None:
            text = command.text
            for shown, meant in STAND_FOR.get(name, {}).items():
                text = text.replace(shown, meant()) if shown in text else text
            sandbox.run(command, text)
