"""Running the command line: in this process for speed, in one of its own where the process matters."""

from __future__ import annotations

import hashlib
import importlib.util
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

from tests import socket_guard
from tests.json_documents import require_valid_output

REPOSITORY = Path(__file__).parent.parent

# No test measures time: on a busy machine any example may take long.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Where these say that a CI runs it, pytest compares what an assertion finds unequal to the end. For two disks of a MiB
# that takes an hour, also in tests that expect the assertion to fail.
for _variable in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_variable, None)

# A job in the background of a script is started with signals ignored, and so would be all that it starts.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def use_engine_from(folder: Path) -> None:
    """Make `tapfs.kernel._engine` the one in `folder`, before anything imports it (see build_engine.py)."""
    name = "tapfs.kernel._engine"
    spec = importlib.util.spec_from_file_location(name, folder / "_engine.abi3.so")
    assert spec is not None
    assert spec.loader is not None
    assert name not in sys.modules, "the engine is loaded already"
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if "TAPFS_ENGINE_DIR" in os.environ:
    use_engine_from(Path(os.environ["TAPFS_ENGINE_DIR"]))
    # The sanitizers' runtime is ours alone: qemu-img hangs under it.
    os.environ.pop("LD_PRELOAD", None)


socket_guard.watch()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Fail the test after which a live socket has lost its descriptor."""
    if lost := socket_guard.lost_descriptors():
        pytest.fail("\n".join(lost), pytrace=False)


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Fixture(NamedTuple):
    """An image of fixtures/MANIFEST.toml, unpacked."""

    path: Path
    backing: Path | None
    guest_sha256: str


@pytest.fixture
def tapfs(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """`tapfs` in this process."""
    monkeypatch.delenv("TAPFS_PASSWORD", raising=False)

    def run(*words: object) -> Ran:
        from tapfs.cli.main import main

        capfd.readouterr()
        texts = [os.fspath(word) if isinstance(word, Path) else str(word) for word in words]
        code = main(texts)
        out, err = capfd.readouterr()
        require_valid_output(texts, out)
        return Ran(code, out, err)

    return run


@pytest.fixture
def tapfs_command() -> list[str]:
    """The words that start `tapfs` as a process of its own."""
    return [sys.executable, "-m", "tapfs.cli"]


@pytest.fixture
def tapfs_process(tapfs_command: list[str]) -> Callable[..., Ran]:
    """`tapfs` in a process of its own, without a terminal."""

    def run(*words: object, timeout: float = 60, **options: object) -> Ran:
        environment = {name: value for name, value in os.environ.items() if name != "TAPFS_PASSWORD"}
        done = subprocess.run(
            [*tapfs_command, *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            start_new_session=True,
            **({"env": environment} | options),  # type: ignore[call-overload]
        )
        require_valid_output(list(map(str, words)), done.stdout)
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


def unpack(compressed: Path, folder: Path) -> Path:
    """An xz file of fixtures/ unpacked into `folder`."""
    target = folder / compressed.stem
    if not target.exists():
        target.write_bytes(lzma.decompress(compressed.read_bytes()))
    return target


@pytest.fixture(scope="session")
def blktap_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fixture]:
    """Every image of fixtures/MANIFEST.toml by its name without folder and suffixes. Not to be changed."""
    folder = tmp_path_factory.mktemp("fixtures")
    manifest = tomllib.loads((REPOSITORY / "fixtures/MANIFEST.toml").read_text())
    images: dict[str, Fixture] = {}
    for entry in manifest["image"]:
        path = unpack(REPOSITORY / "fixtures" / entry["file"], folder)
        backing = entry.get("backing")
        below = unpack(REPOSITORY / "fixtures" / backing, folder) if backing else None
        images[path.stem] = Fixture(path, below, entry["guest_sha256"])
    return images


@pytest.fixture
def ram_name() -> Iterator[str]:
    """A name for a RAM disk that nobody else uses; the disk is removed afterwards."""
    name = f"ram:tapfs-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield name
    Path("/dev/shm", "tapfs.ram." + name.removeprefix("ram:")).unlink(missing_ok=True)  # noqa: S108


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of 3 MiB and 512 bytes: zeros, text and noise, partly sparse. Not to be changed."""
    path = tmp_path_factory.mktemp("sample") / "sample.raw"
    noise = b"".join(hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(1 << 14))
    with path.open("wb") as file:
        file.write(b"boot" * 128)
        file.seek(512 << 10)
        file.write(noise)
        file.write(bytes(256 << 10))
        file.write(b"".join(b"line %06d\n" % number for number in range(20000)))
        file.seek((3 << 20) - 100)
        file.write(b"x" * 612)
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture
def sticky() -> Iterator[Path]:
    """A folder like /tmp: everybody may make files in it and remove only those of their own."""
    assert os.geteuid() == 0, "run the suite as root: tests as another user need it"
    folder = Path(tempfile.mkdtemp(prefix="tapfs-test-", dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)
