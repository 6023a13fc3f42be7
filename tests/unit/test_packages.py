"""The lists of packages agree: those of the scripts, of the README, of messages, and of the build itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tapfs.fuse import mounting
from tests.conftest import REPOSITORY

#: What pip compiles pyfuse3 with, and what a mount needs when it runs.
OF_MOUNTING = {"gcc", "python3-dev", "pkg-config", "libfuse3-dev", "fuse3"}
OF_THE_ENGINE = {"gcc", "python3-dev", "libdeflate-dev", "libssl-dev", "zlib1g-dev", "libzstd-dev"}
#: Without it the engine is built, and has no probes.
OF_PROBES = {"systemtap-sdt-dev"}


def test_the_script_installs_all_of_it() -> None:
    script = (REPOSITORY / "scripts/system-packages").read_text()
    found = re.search(r'^build="(.*)"$', script, re.MULTILINE)
    assert found is not None
    assert set(found[1].split()) == OF_MOUNTING | OF_THE_ENGINE | OF_PROBES | {"make", "python3-venv"}


def test_the_readme_names_all_of_it() -> None:
    text = (REPOSITORY / "README.md").read_text()
    engine, mounting_ = text[text.index("`pip install .`") :].split("`pip install '.[fuse]'`")[:2]
    assert set(re.findall(r"[a-z0-9]+-(?:dev|venv|config)|gcc", engine)) == OF_THE_ENGINE | {"python3-venv"}
    paragraph = mounting_.split("\n\n")[0]
    assert set(re.findall(r"fuse3\b|libfuse3-dev|pkg-config", paragraph)) == OF_MOUNTING - OF_THE_ENGINE


def test_the_message_of_a_missing_pyfuse3_names_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyfuse3", None)
    monkeypatch.delitem(sys.modules, "tapfs.host.fuse_binding", raising=False)
    with pytest.raises(mounting.ImageError) as caught:
        mounting.require_fuse()
    assert set(str(caught.value.remedy).split("apt install ")[1].split()) == OF_MOUNTING


@pytest.mark.parametrize(
    ("missing", "package"),
    [("Python.h", "python3-dev"), ("zlib.h", "zlib1g-dev"), ("libdeflate.h", "libdeflate-dev")],
)
def test_the_build_names_what_is_missing(tmp_path: Path, missing: str, package: str) -> None:
    """A compiler that does not find one header."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nif grep -q "<{missing}>"; then exit 1; fi\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "tapfs/kernel/build_engine.py", "--lint"],
        cwd=REPOSITORY,
        env=os.environ | {"CC": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"tapfs: the engine needs headers that are not installed: apt install {package}\n"


def test_the_demo_needs_no_tool_of_developers() -> None:
    """`make demo` once installed 400 MB of them."""
    plan = subprocess.run(
        ["make", "-n", "-B", "demo", "VENV=build/none"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert "install_requirements.py pyproject.toml\n" in plan
    assert "pyproject.toml dev" not in plan
    tests = subprocess.run(
        ["make", "-n", "-B", "suite", "VENV=build/none"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert "pyproject.toml dev" in tests
    groups = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["dependency-groups"]
    assert {"pytest>=8", "mypy>=1.11"} <= set(groups["dev"])
    script = (REPOSITORY / "scripts/install_requirements.py").read_text()
    assert '"dev"' not in script
    assert "tapfs mount --files" in (REPOSITORY / "scripts/demo").read_text()
