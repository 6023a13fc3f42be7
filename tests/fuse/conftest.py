"""Mounting as a user does: by the command, in processes of their own; and seeing that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tapfs.fuse.mount_table import mounted_file_systems, unmount
from tapfs.serving.processes import process_start
from tests.conftest import Ran
from tests.json_documents import require_valid_output

MIB = 1 << 20


class Mounts:
    """`tapfs mount` and `umount` with a runtime directory and mount points of one test."""

    def __init__(self, folder: Path, command: list[str], engine: str) -> None:
        self.engine = engine
        self.folder = folder
        self.command = command
        self.runtime = folder / "runtime"
        self.environment = os.environ | {"TAPFS_RUNTIME_DIR": str(self.runtime)}
        self.environment.pop("TAPFS_PASSWORD", None)
        self._count = 0
        self._seen: dict[int, int | None] = {}
        self._outside: set[int] = set()

    def run(self, *words: object, cwd: Path | None = None) -> Ran:
        """Any tapfs command."""
        done = subprocess.run(
            [*self.command, *self._with_engine(words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=cwd,
            env=self.environment,
        )
        require_valid_output(list(map(str, words)), done.stdout)
        return Ran(done.returncode, done.stdout, done.stderr)

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Any tapfs command, not waited for."""
        return subprocess.Popen(
            [*self.command, *self._with_engine(words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def _with_engine(self, words: Sequence[object]) -> list[str]:
        """The words of a command; `mount` serves by the engine under test unless they name one."""
        command = [str(word) for word in words]
        if command[0] == "mount" and "--engine" not in command:
            command[1:1] = ["--engine", self.engine]
        return command

    def directory(self) -> Path:
        """A new empty mount point."""
        self._count += 1
        directory = self.folder / f"mount {self._count}"
        directory.mkdir()
        return directory

    def mount(self, image: Path, *options: object) -> Path:
        """Mount on a new directory."""
        directory = self.directory()
        assert self.run("mount", *options, image, directory) == Ran(0, "", "")
        return directory

    def umount(self, directory: Path) -> None:
        """Unmount; nothing may go wrong, but it may take its time, which the command says."""
        done = self.run("umount", directory)
        assert (done.code, done.out, without_waiting(done.err)) == (0, "", "")
        assert list(directory.iterdir()) == []

    def foreground(self, image: Path, directory: Path, *options: object) -> subprocess.Popen[str]:
        """`tapfs mount --foreground`, once it is ready."""
        process = self.start("mount", "--foreground", *options, image, directory)
        wait_for(lambda: (directory / "disk").exists() or process.poll() is not None)
        return process

    def processes(self) -> list[int]:
        """The processes of this test's runtime directory, but for those outside of a sandbox and for keepers.

        A keeper that is alone counts.
        """
        found = self.all_processes()
        # One that is ending loses its words some time before it has ended.
        self._outside |= {pid for pid in found if b"tapfs.fuse.outside" in _words_of(pid)}
        running = [pid for pid in found if pid not in self._outside]
        return [pid for pid in running if not is_keeper(pid)] or running

    def kill(self, *servers: int) -> None:
        """Kill servers so that none follows them: their keepers first, if they have any."""
        for server in servers:
            keeper = parent_of(server)
            for pid in (keeper, server) if is_keeper(keeper) else (server,):
                os.kill(pid, signal.SIGKILL)

    def served_by(self, started: int) -> bool:
        """Whether one process serves, which is the started one or that of the keeper which this has become."""
        serving = self.processes()
        return len(serving) == 1 and started in (serving[0], parent_of(serving[0]))

    def all_processes(self) -> list[int]:
        """The processes that run with this test's runtime directory."""
        mark = f"TAPFS_RUNTIME_DIR={self.runtime}".encode()
        marked = [int(process.name) for process in Path("/proc").glob("[0-9]*") if mark in _environment(process)]
        # One that is ending loses its environment some time before it closes its files, and has ended.
        running = {pid: process_start(pid) for pid in {*self._seen, *marked}}
        self._seen |= {pid: running[pid] for pid in marked}
        self._seen = {pid: start for pid, start in self._seen.items() if start is not None and running[pid] == start}
        return sorted(self._seen)

    def mounted(self) -> list[str]:
        """What is mounted below this test's folder, innermost last."""
        below = f"{self.folder}/"
        return [mount.mount_point for mount in mounted_file_systems() if mount.mount_point.startswith(below)]

    def left_behind(self) -> list[str]:
        """Everything that a test must have cleared away."""
        if not list(self.runtime.glob("*.json")):
            # Nothing is mounted. The process outside of a sandbox, and what it has looked by, end by themselves.
            comes_to_hold(lambda: not self.all_processes(), patience=10)
        files = [str(path) for path in self.runtime.glob("*")]
        return [*self.mounted(), *(f"process {pid}" for pid in self.all_processes()), *files]

    def force_away(self) -> None:
        """Clear away what can be, whatever the state."""
        for mount in reversed(self.mounted()):
            unmount(mount, lazy=True)
        for pid in sorted(self.all_processes(), key=is_keeper, reverse=True):
            os.kill(pid, signal.SIGKILL)


def without_waiting(said: str) -> str:
    """What a command said, but for what an unmounting waits for: a loaded machine takes its time."""
    return "".join(line for line in said.splitlines(keepends=True) if "waiting for process" not in line)


def parent_of(pid: int) -> int:
    """The parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_keeper(pid: int) -> bool:
    """Whether a process is the keeper of a mount."""
    try:
        return b"\0tapfs.fuse.keeper\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


#: Modules whose tests see nothing of the engine: names, choices, formats. They run with one unless all are asked for.
ONE_ENGINE = frozenset(
    f"test_{name}.py"
    for name in (
        *("choosing", "elsewhere", "files", "foreign", "list", "mount_helper", "partitions", "surroundings", "unclean"),
        *("faces", "vdi", "vhd", "vmdk"),
    )
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what mounts with each engine, if it does not say with which; TAPFS_ALL_ENGINES=1 leaves out nothing."""
    chosen = any("mounts" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "mounts" in metafunc.fixturenames and not chosen:
        one = metafunc.definition.path.name in ONE_ENGINE and not os.environ.get("TAPFS_ALL_ENGINES")
        metafunc.parametrize("mounts", ["native"] if one else ["native", "pyfuse3"], indirect=True)


@pytest.fixture
def mounts(request: pytest.FixtureRequest, tmp_path: Path, tapfs_command: list[str]) -> Iterator[Mounts]:
    """Mounts of one test, which runs once for each engine.

    It fails if a mount, a process or a file in the runtime directory is left.
    """
    all_mounts = Mounts(tmp_path, tapfs_command, request.param)
    yield all_mounts
    try:
        comes_to_hold(lambda: not all_mounts.processes(), patience=30)
        left = all_mounts.left_behind()
    finally:
        all_mounts.force_away()
    assert left == []


@pytest.fixture
def root() -> None:
    """Some of what mounts are for takes root: loop devices, tmpfs, other users."""
    assert os.geteuid() == 0, "run the suite as root: loop mounts and tests as another user need it"


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tree of files. Not to be changed."""
    folder = tmp_path_factory.mktemp("content")
    (folder / "text").write_text("hello\n")
    (folder / "below").mkdir()
    (folder / "below" / "large").write_bytes(os.urandom(3 * MIB + 17))
    return folder


def ext4(path: Path, content: Path, size_mib: int = 24, offset: int = 0, label: str = "files") -> None:
    """Make an ext4 with this content in a file, at a byte offset."""
    command = ["mkfs.ext4", "-q", "-F", "-L", label, "-d", str(content), "-E", f"offset={offset},root_owner=0:0"]
    subprocess.run([*command, str(path), f"{size_mib}M"], check=True, capture_output=True)


@pytest.fixture
def flat(tmp_path: Path, content: Path) -> Path:
    """A raw disk that is an ext4."""
    path = tmp_path / "flat.raw"
    path.touch()
    ext4(path, content)
    return path


def loop_devices() -> set[str]:
    """The loop devices in use."""
    return {path.parent.parent.name for path in Path("/sys/block").glob("loop*/loop/backing_file")}


@pytest.fixture
def no_new_loop_device() -> Iterator[None]:
    """The test fails if it leaves a loop device."""
    before = loop_devices()
    yield
    wait_for(lambda: loop_devices() <= before, patience=30)


def make_file_system(image: Path, kind: str, content: Path) -> None:
    """Make one, with the content where its maker can."""
    size = {"xfs": 320, "btrfs": 128}.get(kind, 32)
    if kind not in {"squashfs", "iso9660"}:
        with image.open("wb") as file:
            file.truncate(size * MIB)
    commands = {
        "ext2": ["mkfs.ext2", "-q", "-F", "-d", content, image],
        "ext4": ["mkfs.ext4", "-q", "-F", "-d", content, image],
        "xfs": ["mkfs.xfs", "-q", image],
        "btrfs": ["mkfs.btrfs", "-q", "-r", content, image],
        "squashfs": ["mksquashfs", content, image, "-quiet"],
        "ntfs": ["mkfs.ntfs", "-q", "-F", image],
        "vfat": ["mkfs.vfat", image],
        "iso9660": ["xorriso", "-as", "mkisofs", "-quiet", "-R", "-o", image, content],
    }
    subprocess.run(list(map(str, commands[kind])), check=True, capture_output=True)


@contextmanager
def somebody(**options: object) -> Generator[subprocess.Popen[bytes]]:
    """A process named `sleep` that uses what it is started with; killed at the end, if not before."""
    with subprocess.Popen(["sleep", "1000"], **options) as user:  # type: ignore[call-overload]
        try:
            yield user
        finally:
            user.kill()


@contextmanager
def refused(*numbers: int) -> Generator[None]:
    """What happens inside must fail with one of these errno values (with any, if there are none)."""
    wanted = "|".join(map(str, numbers)) or r"\d+"
    with pytest.raises(OSError, match=rf"\[Errno ({wanted})\]"):
        yield


def comes_to_hold(condition: Callable[[], object], patience: float = 60, step: float = 0.01) -> bool:
    """Whether something comes to hold in time, for callers that tell more of it than that it did not."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(step)
    return True


def wait_for(condition: Callable[[], object], patience: float = 60, step: float = 0.01) -> None:
    """Wait until something holds that must come to hold; the test fails if it does not."""
    if not comes_to_hold(condition, patience, step):
        where = condition.__code__
        pytest.fail(f"what {where.co_filename}:{where.co_firstlineno} waits for did not come in {patience:g} s")


def _words_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def is_traced(pid: int, tracer: int) -> bool:
    """Whether every thread of a process has this tracer: strace takes one after the other."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if f"TracerPid:\t{tracer}\n" not in (thread / "status").read_text():
                return False
    return True
