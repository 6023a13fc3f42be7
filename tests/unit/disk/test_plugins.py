"""Drivers of other packages come in by entry point, and a broken one harms nobody."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tapfs.disk import plugins, probe
from tapfs.errors import ErrorKind, ImageError
from tests.conftest import Ran

Run = Callable[..., Ran]
Install = Callable[..., None]

DRIVER = """
from tapfs.formats.raw import IdentityDriver
class {name}:
    name = '{name}'
    def probe(self, head, size):
        return 90 if head.startswith(b'{name}') else 0
    def open(self, file, request):
        return IdentityDriver(file, self.name)
FORMAT = {name}()
"""
#: Ways to be broken: the name of the format, the module's text, what the warning says of it.
BROKEN: dict[str, tuple[str, str, str]] = {
    "import": ("bad", "import nothing_of_the_kind", "it cannot be loaded: ModuleNotFoundError: No module named"),
    "syntax": ("bad", "def", "it cannot be loaded: SyntaxError"),
    "exit": ("bad", "raise SystemExit(3)", "it cannot be loaded: SystemExit: 3"),
    "no target": ("bad", "", "it cannot be loaded: AttributeError: module 'bad' has no attribute 'FORMAT'"),
    "no format": ("bad", "FORMAT = 7", "bad:FORMAT is no tapfs.driver.Format: it lacks name, probe or open"),
    "half a format": ("bad", "class FORMAT:\n    name = 'bad'\n", "it lacks name, probe or open"),
    "other name": ("bad", DRIVER.format(name="other"), "bad:FORMAT calls itself 'other'"),
    "ours": ("qcow", DRIVER.format(name="qcow"), "tapfs has a format 'qcow' of its own"),
    "raw": ("raw", DRIVER.format(name="raw"), "tapfs has a format 'raw' of its own"),
    "probe raises": (
        "bad",
        DRIVER.format(name="bad").replace("return 90", "raise KeyError(7)\n        return 9"),
        "KeyError",
    ),
    "probe answers": (
        "bad",
        DRIVER.format(name="bad").replace("return 90 if", "return 'yes' if True or"),
        "not a number",
    ),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages with a driver each, for this test."""
    site = tmp_path / "site"
    caches = (probe._others, probe.format_named, plugins.leave_out)
    modules = set(sys.modules)

    def make(package: str, name: str, text: str) -> None:
        folder = site / f"{package}-1.0.dist-info"
        folder.mkdir(parents=True)
        module = "bad" if name in ("raw", "qcow") else name
        (folder / "entry_points.txt").write_text(f"[tapfs.formats]\n{name} = {module}:FORMAT\n")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (site / f"{module}.py").write_text(text)
        importlib.invalidate_caches()

    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    for cached in caches:
        cached.cache_clear()
    yield make
    for cached in caches:
        cached.cache_clear()
    for added in set(sys.modules) - modules:
        if str(site) in str(getattr(sys.modules[added], "__file__", None)):
            del sys.modules[added]


def test_other_formats_come_in_by_entry_point(install: Install, tmp_path: Path) -> None:
    install("dotted-driver", "dotted", DRIVER.format(name="dotted"))
    (tmp_path / "image").write_bytes(b"dotted" + bytes(1000))
    with tapfs_package.open(tmp_path / "image") as disk:
        assert disk.format_name == "dotted"
    assert "dotted" in probe.format_names()


def guessed(path: str) -> str:
    """The format that the contents of an image show."""
    with tapfs_package.open(path) as disk:
        return disk.format_name


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_driver_is_left_out_with_one_warning(
    install: Install, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, text, says = BROKEN[kind]
    install("good-driver", "good", DRIVER.format(name="good"))
    install("bad-driver", name, text)
    monkeypatch.chdir(tmp_path)
    Path("image.raw").write_bytes(bytes(4096))
    Path("image.good").write_bytes(b"good" + bytes(4092))
    with pytest.warns(RuntimeWarning) as caught:
        assert [guessed(f"image.{each}") for each in ("raw", "good") * 2] == ["raw", "good"] * 2
    (warning,) = caught
    assert f"the driver of the format {name!r} of bad-driver 1.0 is left out: " in str(warning.message)
    assert says in str(warning.message)
    with tapfs_package.open("image.raw", format="raw") as disk:
        assert disk.size == 4096
    tapfs_package.create("image.qcow", "qcow", 1 << 20)
    with tapfs_package.open("image.qcow") as disk:
        assert disk.format_name == "qcow"


@pytest.mark.filterwarnings("default")
def test_the_command_line_says_so_in_one_line(install: Install, tmp_path: Path, tapfs: Run) -> None:
    install("bad-driver", "bad", "raise ValueError('two\\nlines \\x1b[31m')")
    (tmp_path / "image").write_bytes(bytes(4096))
    code, out, err = tapfs("info", tmp_path / "image")
    assert code == 0
    assert "raw" in out
    assert err.startswith("tapfs: warning: the driver of the format 'bad' of bad-driver 1.0 is left out: it cannot be")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    code, out, err = tapfs("formats")
    assert (code, err) == (0, "")
    assert "bad" not in out
    code, _, err = tapfs("info", "-f", "bad", tmp_path / "image")
    assert code == 12
    assert "unknown format 'bad'" in err


def test_its_line(tmp_path: Path, tapfs_process: Run) -> None:
    folder = tmp_path / "bad_driver-1.0.dist-info"
    folder.mkdir()
    (folder / "entry_points.txt").write_text("[tapfs.formats]\nbad = bad:FORMAT\n")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-driver\nVersion: 1.0\n")
    (tmp_path / "bad.py").write_text("raise ValueError('why')")
    (tmp_path / "image").write_bytes(bytes(4096))
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "TAPFS_RUNTIME_DIR": str(tmp_path / "run")}
    line = (
        "tapfs: warning: the driver of the format 'bad' of bad-driver 1.0 is left out: "
        "it cannot be loaded: ValueError: why\n"
    )
    for words in (["info", "image"], ["map", "image"], ["compare", "image", "image"], ["convert", "image", "new"]):
        code, _, err = tapfs_process(*words, cwd=tmp_path, env=environment)
        assert (code, err) == (0, line), words
    (tmp_path / "folder").mkdir()
    assert tapfs_process("mount", "image", "folder", cwd=tmp_path, env=environment)[::2] == (0, line)
    assert tapfs_process("umount", "folder", cwd=tmp_path, env=environment).code == 0


def test_a_driver_that_fails_to_open_is_named(install: Install, tmp_path: Path, tapfs: Run) -> None:
    text = DRIVER.format(name="bad").replace("return IdentityDriver(file, self.name)", "raise KeyError('table')")
    install("bad-driver", "bad", text)
    image = tmp_path / "image"
    image.write_bytes(b"bad" + bytes(4093))
    with pytest.raises(ImageError) as raised:
        tapfs_package.open(image)
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    said = f"{image}: the driver of the format 'bad' of bad-driver 1.0 failed: KeyError: 'table'"
    assert said in str(raised.value)
    code, _, err = tapfs("info", image)
    assert code == 12
    assert said in err
    assert "internal error" not in err


def test_two_packages_with_one_name(install: Install, tmp_path: Path) -> None:
    install("a-driver", "same", DRIVER.format(name="same"))
    install("b-driver", "same", DRIVER.format(name="same"))
    (tmp_path / "image").write_bytes(b"same" + bytes(1000))
    with pytest.warns(RuntimeWarning, match="has the same name"), tapfs_package.open(tmp_path / "image") as disk:
        assert disk.format_name == "same"
