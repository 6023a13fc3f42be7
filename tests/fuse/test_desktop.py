"""The handler of file managers: a double click on an image shows its files, a second one ends that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.fuse.conftest import Mounts

_HANDLER = REPOSITORY / "packaging/mount-files"

pytestmark = pytest.mark.usefixtures("root")


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_double_click_shows_the_files(mounts: Mounts, content: Path, tmp_path: Path) -> None:
    raw, image = tmp_path / "raw", tmp_path / "an image.qcow2"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", content, raw, "16M"], check=True)
    assert mounts.run("convert", "-f", "raw", "-O", "qcow2", raw, image).code == 0
    programs, session = tmp_path / "programs", tmp_path / "session"
    programs.mkdir()
    session.mkdir(mode=0o700)
    write_program(programs / "tapfs", f'exec {sys.executable} -m tapfs.cli "$@"')
    write_program(programs / "xdg-open", f'ls "$1" > {tmp_path}/shown')
    write_program(programs / "notify-send", f'printf %s "$3" > {tmp_path}/told')

    def click(*words: object) -> int:
        environment = mounts.environment | {"PATH": f"{programs}:/usr/bin:/bin", "XDG_RUNTIME_DIR": str(session)}
        return subprocess.run([_HANDLER, *words], env=environment, cwd=REPOSITORY, check=False).returncode

    assert click(image) == 0
    assert {"text", "below"} <= set((tmp_path / "shown").read_text().split())
    (tmp_path / "shown").unlink()
    assert click(image) == 0, "a second click shows what is mounted"
    assert (tmp_path / "shown").exists()
    assert click("--unmount", image) == 0
    assert list((session / "tapfs-files").iterdir()) == []

    (tmp_path / "none.qcow2").write_bytes(b"QFI\xfb")
    assert click(tmp_path / "none.qcow2") == 1
    assert "none.qcow2" in (tmp_path / "told").read_text()
    assert list((session / "tapfs-files").iterdir()) == []
