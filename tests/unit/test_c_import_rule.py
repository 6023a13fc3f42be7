"""The import rule of kernel/README.md: which folder of kernel/src knows which, and no file in a circle of calls.

Includes are read from the sources, calls from the symbols of the compiled objects.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = REPOSITORY / "kernel/src"

#: The folders that each folder may include and call, besides itself and common.h. Front ends never see each other.
MAY_USE = {
    "host": set[str](),
    "engine": {"host"},
    "copying": {"engine"},
    "mover": {"engine", "host"},
    "serving": {"engine"},
    "fuse": {"engine", "host", "mover", "serving"},
    "nbd": {"engine", "host", "mover", "serving"},
    "vhost": {"engine", "host", "mover", "serving"},
    "ublk": {"engine", "host", "mover", "serving"},
    "xen": {"engine", "host", "mover", "serving"},
}

Graph = Mapping[str, set[str]]


def files(pattern: str) -> list[Path]:
    return sorted(SOURCES.rglob(pattern))


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCES))


def folder_of(name: str) -> str:
    return name.partition("/")[0]


def includes() -> dict[str, set[str]]:
    """Of each source and header the files of ours that it includes."""
    found = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
    return {name_of(path): set(found.findall(path.read_text())) for path in files("*.[ch]")}


def symbols(compiled: Path, *options: str) -> set[str]:
    command = ["nm", "--format=just-symbols", *options, compiled]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def compile_one(source: Path, folder: Path) -> Path:
    compiled = folder / name_of(source).replace("/", "_")
    command = ["gcc", "-D_GNU_SOURCE", "-std=gnu11", "-w", "-O0", "-c", f"-I{SOURCES}", "-o", compiled, source]
    subprocess.run(command, check=True)
    return compiled


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Of each source the sources whose functions and data it names."""
    folder = tmp_path_factory.mktemp("objects")
    sources = files("*.c")
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(sources, pool.map(lambda source: compile_one(source, folder), sources), strict=True))
    home = {
        symbol: name_of(source)
        for source, path in compiled.items()
        for symbol in symbols(path, "--defined-only", "--extern-only")
    }
    return {
        name_of(source): {home[symbol] for symbol in symbols(path, "--undefined-only") if symbol in home}
        for source, path in compiled.items()
    }


def require_no_circle(graph: Graph) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def require_allowed(graph: Graph) -> None:
    for name, others in graph.items():
        folder = folder_of(name)
        used = {folder_of(other) for other in others if other != "common.h"} - {folder}
        assert used <= MAY_USE.get(folder, set()), name


def test_the_rule_is_about_the_folders_that_there_are() -> None:
    assert {folder_of(name_of(path)) for path in files("*.c")} == set(MAY_USE)
    assert [path.name for path in SOURCES.iterdir() if path.is_file()] == ["common.h"]
    require_no_circle(MAY_USE)


def test_an_include_names_its_folder() -> None:
    for name, others in includes().items():
        missing = {other for other in others if not (SOURCES / other).is_file()}
        assert not missing, name


def test_includes_keep_to_the_folders() -> None:
    require_allowed(includes())


def test_no_circle_of_includes() -> None:
    require_no_circle(includes())


def test_calls_keep_to_the_folders(calls: Graph) -> None:
    require_allowed(calls)


def test_no_circle_of_files(calls: Graph) -> None:
    require_no_circle(calls)


def test_calls_are_seen(calls: Graph) -> None:
    """One call of each kind, so that an empty graph does not pass."""
    assert "engine/read.c" in calls["engine/reserved.c"]  # a function
    assert "host/file.c" in calls["engine/layer_write.c"]  # data: zero_chunk
    assert "serving/park.c" in calls["fuse/answers.c"]  # another folder
