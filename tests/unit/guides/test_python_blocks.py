"""The blocks of Python in README.md and docs/python.md run, in the order of their page, in one namespace.

Those of formats/README.md and docs/front-end.md are programs: tests/unit/testing/test_kit.py and
tests/unit/serving/test_front_end_guide.py run them.
"""

from __future__ import annotations

import ast
import asyncio
import io
import re
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import trio

import tapfs
from tests.conftest import REPOSITORY
from tests.unit.guides.prepared import disk, program, raw

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: What other tests run.
_ELSEWHERE = {"formats/README.md", "docs/front-end.md"}

#: Blocks of a page that need a place which is not here, and that place.
_STAND_FOR = {"gcs://bucket/": "memory://bucket/", "s3://bucket/": "memory://bucket/"}


def readme(folder: Path) -> dict[str, object]:
    del folder
    raw("disk.raw")
    tapfs.convert("disk.raw", "disk.qcow", format="raw", target_format="qcow")
    return {}


def python(folder: Path) -> dict[str, object]:
    raw("disk.raw")
    with tapfs.open("disk.raw", format="raw", writable=True) as image:
        image.write(3 << 19, b"in the first partition")
    tapfs.convert("disk.raw", "disk.qcow", format="raw", target_format="qcow")
    disk("monday.qcow2", "qcow2")
    shutil.copy("monday.qcow2", "tuesday.qcow2")
    with tapfs.open("tuesday.qcow2", writable=True) as image:
        image.write(1 << 20, b"tuesday")
    tapfs.convert("disk.raw", "disk.qcow2", format="raw", target_format="qcow2")
    tapfs.convert("disk.qcow2", "disk.vhdx", target_format="vhdx")
    tapfs.convert("disk.qcow2", "disk.vmdk", target_format="vmdk", options={"subformat": "monolithicSparse"})
    tapfs.create("other.raw", "raw", 16 << 20)
    disk("overlay.qcow2", "qcow2", backing="monday.qcow2")
    tapfs.create(
        "secret.qcow2", "qcow2", 1 << 20, options={"encrypt.format": "luks", "encrypt.iter-time": "10"}, password=b"old"
    )
    with zipfile.ZipFile("images.zip", "w") as archive:
        archive.write("disk.qcow2")
    shutil.copy("disk.qcow2", "with-snapshot.qcow2")
    tapfs.create_snapshot("with-snapshot.qcow2", "monday")
    memory = fsspec.filesystem("memory")
    for name in ("disk.vmdk", "disk.qcow2"):
        source = "with-snapshot.qcow2" if name == "disk.qcow2" else name
        memory.pipe_file(f"/bucket/{name}", (folder / source).read_bytes())
    for name in ("e2fsck", "qemu-system-x86_64"):
        program(name, "exit 0")
    for name in ("image", "results"):
        (folder / name).mkdir()
    return {"fsspec": fsspec, "subprocess": subprocess, "path": "disk.qcow"}


PAGES: dict[str, Callable[[Path], dict[str, object]]] = {"README.md": readme, "docs/python.md": python}


def blocks(page: str) -> Iterator[tuple[int, str]]:
    """Each block of Python of a page, and the line that it begins in."""
    text = (REPOSITORY / page).read_text()
    for found in _BLOCK.finditer(text):
        yield text.count("\n", 0, found.start(1)), found[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_python_of_a_page_runs(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"tapfs": tapfs, "io": io, **PAGES[page](folder)}
    for line, text in blocks(page):
        for shown, meant in (*_STAND_FOR.items(), ("/mnt/image", str(folder / "image"))):
            text = text.replace(shown, meant)  # noqa: PLW2901
        source = "\n" * line + text
        if "enter_sandbox" in text:  # a process of its own, which stays in it
            ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
            assert (ran.returncode, ran.stderr) == (0, ""), f"{page}:{line}: {ran.stderr}"
            continue
        try:
            code = compile(source, f"{REPOSITORY / page}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            run = types.FunctionType(code, names)
            if code.co_flags & 0x80:  # a coroutine: under both libraries
                asyncio.run(run())
                trio.run(types.FunctionType(code, names))
            else:
                run()
        except Exception as error:  # noqa: BLE001  the place is told
            pytest.fail(f"{page}:{line}: {type(error).__name__}: {error}\n{text}")
    assert capsys.readouterr().err == ""


def test_every_page_with_python_is_run() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "formats/README.md"]
    found = {str(page.relative_to(REPOSITORY)) for page in pages if "```python" in page.read_text()}
    assert found == PAGES.keys() | _ELSEWHERE
