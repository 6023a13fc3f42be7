"""`import tapfs` shows the public names and nothing beside them, at next to no cost."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

import tapfs
from tests.conftest import REPOSITORY


def test_dir_is_the_public_names() -> None:
    assert dir(tapfs) == sorted(tapfs.__all__)
    assert len(set(tapfs.__all__)) == len(tapfs.__all__)


@pytest.mark.parametrize("name", tapfs.__all__)
def test_every_public_name_is_there_and_tells_what_it_is(name: str) -> None:
    assert getattr(tapfs, name).__doc__


def test_the_version_is_that_of_the_distribution() -> None:
    assert tapfs.__version__ == version("tapfs")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'tapfs' has no attribute 'opne'"):
        _ = tapfs.opne  # type: ignore[attr-defined]


def test_importing_loads_nothing_and_opening_only_what_it_needs(tmp_path: object) -> None:
    program = f"""
import sys
before = set(sys.modules)
import tapfs
print(sorted(set(sys.modules) - before))
tapfs.create({str(tmp_path)!r} + "/a.qcow", "qcow", 1 << 20)
tapfs.open({str(tmp_path)!r} + "/a.qcow").close()
heavy = ("trio", "asyncio", "anyio", "pyfuse3", "tapfs.cli", "tapfs.fuse", "tapfs.xen")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert {name.split(".")[0] for name in ast.literal_eval(loaded)} <= {"tapfs", "__future__"}


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_pages_name_only_what_is_there(page: str) -> None:
    """Also that the blocks of Python are Python."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for name in set(re.findall(r"\btapfs\.(\w+)", "\n".join(blocks))):
        assert name in tapfs.__all__, name


def test_the_readme_and_the_package_name_functions_that_are_there() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"^(`info`.*) and most other commands are functions", readme, flags=re.MULTILINE)
    assert tapfs.__doc__
    (commands,) = re.findall(
        r"^(`info`.*) are the commands of those names", tapfs.__doc__, flags=re.MULTILINE | re.DOTALL
    )
    for name in re.findall(r"`(\w+)`", sentence + commands):
        assert name in tapfs.__all__, name
