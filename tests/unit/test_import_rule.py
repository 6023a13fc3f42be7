"""The import rule of ARCHITECTURE.md: drivers are pure, few modules know the engine."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: All that a driver may import of tapfs, besides its own package.
PURE_CORE = {
    "tapfs.checksums",
    "tapfs.driver",
    "tapfs.errors",
    "tapfs.extent",
    "tapfs.identifiers",
    "tapfs.marking",
    "tapfs.patterns",
    "tapfs.plan",
    "tapfs.records",
    "tapfs.references",
    "tapfs.tables",
    "tapfs.xml_tree",
}

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

#: The modules of tapfs/disk that open and map chains: they move no guest data.
BELOW_THE_ENGINE = ["chain", "chain_map", "description", "password", "probe"]

#: What each folder of tapfs/ may import of the others, besides the contract. Front ends never see each other.
CONTRACT = {
    "checksums",
    "ciphers",
    "driver",
    "driver_protocols",
    "edit_protocols",
    "errors",
    "extent",
    "findings",
    "format",
    "geometry",
    "host_files",
    "identifiers",
    "marking",
    "patterns",
    "plan",
    "records",
    "references",
    "reservation",
    "salvage",
    "tables",
    "xml_tree",
}
MAY_IMPORT = {
    "host": set[str](),
    "packages": set[str](),
    "partitions": set[str](),
    "disk": {"host", "kernel", "packages", "partitions"},
    "jobs": {"host", "disk", "kernel", "packages", "partitions"},
    "report": {"host", "disk", "jobs", "kernel", "partitions"},
    "many": {"host", "disk", "jobs", "packages", "partitions"},
    "serving": {"host", "disk", "jobs", "kernel"},
    "api": {"host", "disk", "jobs", "serving", "fuse"},
    "volumes": {"api", "disk", "jobs", "serving"},
    "testing": {"disk"},
    "fuse": {"host", "disk", "jobs", "serving", "partitions", "kernel"},
    "nbd": {"host", "disk", "serving", "kernel"},
    "vhost": {"disk", "serving", "kernel"},
    "ublk": {"host", "disk", "serving", "kernel"},
    "xen": {"host", "disk", "jobs", "serving", "kernel"},
}
#: Where a front end knows another: the device model of an HVM guest is a client of the NBD server.
KNOWS_ANOTHER = {"tapfs/xen/disk": {"nbd"}}
#: Only the process of a disk moves data. What outlives it, and what is to start fast, never loads the engine.
XEN_FOLDER_OF_THE_ENGINE = "tapfs/xen/disk"


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if is_package(node.module or "")}
    return found - {"tapfs"}


def is_package(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] == "tapfs" and (ROOT / module.replace(".", "/")).is_dir()


def python_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("path", python_files("formats"), ids=lambda path: str(path.relative_to(ROOT)))
def test_drivers_import_only_the_pure_core(path: Path) -> None:
    ours = {name for name in imports(path) if name.split(".")[0] == "tapfs" and not name.startswith("tapfs.formats")}
    assert ours <= PURE_CORE
    assert not {name.split(".")[0] for name in imports(path)} & BANNED_IN_DRIVERS


def test_no_driver_modules_import_each_other_in_a_circle() -> None:
    """Late imports and those for types count, too: a module is read after the modules that it names."""
    importing = {module_name(path): imports(path) for path in python_files("tapfs/formats")}
    # "from tapfs.formats.qcow import era" needs the module, not the object of the package.
    left = {
        name: {each for each in found & importing.keys() if not any(other.startswith(f"{each}.") for other in found)}
        for name, found in importing.items()
    }
    while free := {name for name, found in left.items() if not found}:
        left = {name: found - free for name, found in left.items() if name not in free}
    assert not left


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", BELOW_THE_ENGINE)
def test_the_core_below_the_engine_does_not_import_it(name: str) -> None:
    assert not {found for found in imports(ROOT / f"tapfs/disk/{name}.py") if found.startswith("tapfs.kernel")}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_down_the_folders(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | CONTRACT | {folder}
    for path in python_files(f"tapfs/{folder}"):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("tapfs.")}
        assert ours <= allowed | KNOWS_ANOTHER.get(str(path.parent.relative_to(ROOT)), set()), path


def test_the_root_is_the_contract() -> None:
    assert {path.stem for path in (ROOT / "tapfs").glob("*.py")} == CONTRACT | {"__init__"}


#: The only places below the front ends that name a format: the registry, what `ram:` means, what overlays are made in.
NAMES_OF_FORMATS = {"disk/probe.py": {"raw", "qcow", "ram"}, "host/ram.py": {"ram"}, "disk/overlay.py": {"qcow"}}


@pytest.mark.parametrize("folder", ["host", "disk", "jobs", "serving"])
def test_the_core_compares_no_names_of_formats(folder: str) -> None:
    """What is special about a format is one of its traits, which formats of others can have as well."""
    for path in python_files(f"tapfs/{folder}"):
        named = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        allowed = NAMES_OF_FORMATS.get(f"{folder}/{path.name}", set())
        assert named & {"raw", "qcow", "ram"} <= allowed, path


@pytest.mark.parametrize("folder", ["packages", "partitions"])
def test_what_reads_by_a_function_is_pure(folder: str) -> None:
    for path in python_files(f"tapfs/{folder}"):
        found = imports(path)
        ours = {name for name in found if name.split(".")[0] == "tapfs" and not name.startswith(f"tapfs.{folder}")}
        assert ours <= {"tapfs.checksums", "tapfs.errors", "tapfs.extent", "tapfs.records", "tapfs.xml_tree"}, path
        assert not {name.split(".")[0] for name in found} & BANNED_IN_DRIVERS, path


@pytest.mark.parametrize("folder", ["tapfs/fuse", "tapfs/xen", "tapfs/cli"])
def test_front_ends_know_no_format(folder: str) -> None:
    for path in python_files(folder):
        assert not {name for name in imports(path) if name.startswith("tapfs.formats")}, path


@pytest.mark.parametrize(("folder", "other"), [("tapfs/fuse", "tapfs.xen"), ("tapfs/xen", "tapfs.fuse")])
def test_front_ends_do_not_know_each_other_or_the_commands(folder: str, other: str) -> None:
    for path in python_files(folder):
        assert not {name for name in imports(path) if name.startswith((other, "tapfs.cli"))}, path


def files_of_xen_without_the_engine() -> list[Path]:
    """The modules of tapfs/xen that run in the supervisor, in a command of the toolstack, or in every process."""
    return [path for path in python_files("tapfs/xen") if path.parent != ROOT / XEN_FOLDER_OF_THE_ENGINE]


@pytest.mark.parametrize(
    "path", files_of_xen_without_the_engine(), ids=lambda path: str(path.relative_to(ROOT / "tapfs/xen"))
)
def test_of_xen_only_the_process_of_a_disk_reaches_the_engine(path: Path) -> None:
    """An import in a function counts, too: the supervisor must not load the engine late either."""
    reached: set[Path] = set()
    ahead = {path}
    while ahead:
        file = ahead.pop()
        reached.add(file)
        modules = (ROOT / f"{name.replace('.', '/')}.py" for name in imports(file) if name.startswith("tapfs."))
        ahead |= {module for module in modules if module.exists()} - reached
    beyond = (ROOT / XEN_FOLDER_OF_THE_ENGINE, ROOT / "tapfs/kernel")
    assert not [file for file in reached if file.parent in beyond]


def test_nobody_imports_a_second_copy() -> None:
    for folder in ("tapfs", "formats", "kernel", "tests"):
        for path in python_files(folder):
            assert not {name for name in imports(path) if name.split(".")[0] in ("formats", "kernel")}, path
