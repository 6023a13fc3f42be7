"""The import rule of ARCHITECTURE.md: drivers are pure, few modules know the engine."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: All that a driver may import of tapfs, besides its own package.
PURE_CORE = {"tapfs.driver", "tapfs.errors", "tapfs.extent", "tapfs.plan"}

#: What a driver may not import from anywhere: it does no I/O and has no threads.
BANNED_IN_DRIVERS = {
    "os",
    "io",
    "pathlib",
    "mmap",
    "fcntl",
    "socket",
    "subprocess",
    "threading",
    "trio",
    "pyfuse3",
    "cffi",
}

#: Of the process that serves a disk.
XEN_MODULES_OF_THE_ENGINE = {"backend", "frontend_keys", "served_disk"}
#: What outlives a disk's crash, or is only to start fast.
XEN_PROGRAMS_WITHOUT_ENGINE = ["supervisor", "toolstack", "block_script", "control_client"]

#: The core below `image`: opens and maps chains, moves no guest data.
BELOW_THE_ENGINE = [
    "async_image",
    "chain",
    "chain_map",
    "description",
    "driver",
    "errors",
    "extent",
    "host_file",
    "lock",
    "plan",
    "probe",
    "shared_ram",
]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in ("tapfs", "tapfs.xen")}
    return found - {"tapfs"}


def python_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("path", python_files("formats"), ids=lambda path: str(path.relative_to(ROOT)))
def test_drivers_import_only_the_pure_core(path: Path) -> None:
    ours = {name for name in imports(path) if name.split(".")[0] == "tapfs" and not name.startswith("tapfs.formats")}
    assert ours <= PURE_CORE
    assert not {name.split(".")[0] for name in imports(path)} & BANNED_IN_DRIVERS


@pytest.mark.parametrize("name", BELOW_THE_ENGINE)
def test_the_core_below_the_engine_does_not_import_it(name: str) -> None:
    assert not {found for found in imports(ROOT / "tapfs" / f"{name}.py") if found.startswith("tapfs.kernel")}


def test_partitions_are_pure() -> None:
    for path in python_files("tapfs/partitions"):
        found = imports(path)
        ours = {name for name in found if name.split(".")[0] == "tapfs" and not name.startswith("tapfs.partitions")}
        assert ours <= {"tapfs.errors"}, path
        assert not {name.split(".")[0] for name in found} & BANNED_IN_DRIVERS, path


@pytest.mark.parametrize("folder", ["tapfs/fuse", "tapfs/xen", "tapfs/cli"])
def test_front_ends_know_no_format(folder: str) -> None:
    for path in python_files(folder):
        assert not {name for name in imports(path) if name.startswith("tapfs.formats")}, path


@pytest.mark.parametrize(("folder", "other"), [("tapfs/fuse", "tapfs.xen"), ("tapfs/xen", "tapfs.fuse")])
def test_front_ends_do_not_know_each_other_or_the_commands(folder: str, other: str) -> None:
    for path in python_files(folder):
        assert not {name for name in imports(path) if name.startswith((other, "tapfs.cli"))}, path


def test_few_modules_of_the_xen_front_end_know_the_engine() -> None:
    users = {
        path.stem
        for path in python_files("tapfs/xen")
        if any(name.startswith("tapfs.kernel") for name in imports(path))
    }
    assert users <= XEN_MODULES_OF_THE_ENGINE


@pytest.mark.parametrize("program", XEN_PROGRAMS_WITHOUT_ENGINE)
def test_the_supervisor_and_the_commands_do_not_load_the_engine(program: str) -> None:
    reached: set[str] = set()
    ahead = {program}
    while ahead:
        module = ahead.pop()
        reached.add(module)
        found = {
            name.split(".")[2] for name in imports(ROOT / f"tapfs/xen/{module}.py") if name.startswith("tapfs.xen.")
        }
        ahead |= found - reached
    assert not reached & XEN_MODULES_OF_THE_ENGINE


def test_nobody_imports_a_second_copy() -> None:
    for folder in ("tapfs", "formats", "kernel", "tests"):
        for path in python_files(folder):
            assert not {name for name in imports(path) if name.split(".")[0] in ("formats", "kernel")}, path
