"""Modules of tapfs are found by their places, and what is not as usual is left to Python's own search."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tapfs.cli.quick_import import _Finder


@pytest.fixture
def load(tmp_path: Path) -> Callable[[], ModuleType]:
    """Loads the module `tapfs.thing` of the folder anew, as a command would."""

    def loaded() -> ModuleType:
        spec = _Finder.find_spec("tapfs.thing", [os.fspath(tmp_path)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return loaded


def compiled(folder: Path, text: str) -> Path:
    """A module and its byte code, whose source then becomes another of the same length and time."""
    source = folder / "thing.py"
    source.write_text(text)
    os.utime(source, (1_000_000_000, 1_000_000_000))
    code = Path(py_compile.compile(os.fspath(source), doraise=True, invalidation_mode=_TIMES) or "")
    source.write_text(text.replace("1", "2"))
    os.utime(source, (1_000_000_000, 1_000_000_000))
    return code


_TIMES = py_compile.PycInvalidationMode.TIMESTAMP


def test_byte_code_is_taken_while_time_and_length_are_those_of_the_source(
    tmp_path: Path, load: Callable[[], ModuleType]
) -> None:
    code = compiled(tmp_path, "value = 1\n")
    module = load()
    assert module.value == 1
    assert (module.__file__, module.__cached__) == (os.fspath(tmp_path / "thing.py"), os.fspath(code))
    os.utime(tmp_path / "thing.py")
    assert load().value == 2


@pytest.mark.parametrize("content", [b"", b"\0" * 16, b"as it was, of another Python"])
def test_other_byte_code_is_left_to_python(tmp_path: Path, load: Callable[[], ModuleType], content: bytes) -> None:
    compiled(tmp_path, "value = 1\n").write_bytes(content)
    assert load().value == 2


def test_long_byte_code_is_left_to_python(tmp_path: Path, load: Callable[[], ModuleType]) -> None:
    compiled(tmp_path, f"value = 1\ntext = {'x' * 70_000!r}\n")
    assert load().value == 1


def test_packages_and_what_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing/__init__.py").touch()
    (tmp_path / "engine.abi3.so").touch()
    folder = [os.fspath(tmp_path)]
    spec = _Finder.find_spec("tapfs.thing", folder)
    assert spec is not None
    assert spec.submodule_search_locations == [os.fspath(tmp_path / "thing")]
    assert _Finder.find_spec("tapfs.engine", folder) is None
    assert _Finder.find_spec("tapfs", None) is None
    assert _Finder.find_spec("json.thing", folder) is None


def test_a_command_loads_its_modules_so(sample: Path) -> None:
    script = (
        f"import sys\nsys.argv = ['tapfs', 'info', {os.fspath(sample)!r}]\nimport atexit\n"
        "from tapfs.cli.entry import tapfs\n"
        "ours = lambda: {type(module.__loader__).__module__ for name, module in sys.modules.items()"
        " if name.startswith('tapfs.disk.')}\n"
        "atexit.register(lambda: print(ours(), file=sys.stderr))\ntapfs()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "{'tapfs.cli.quick_import'}\n"
