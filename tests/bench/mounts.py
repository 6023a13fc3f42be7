"""The contenders of the FUSE benchmark: ways to see an image as a flat file."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.runner import TAPFS

_PATIENCE_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Contender:
    """A name for the table, the formats it can serve, and how it serves one writable."""

    name: str
    formats: tuple[str, ...]
    serve: Callable[[Path, str, Path], Generator[Path]]


def contenders(qemu_programs: Path | None) -> list[Contender]:
    """Those that this machine has; `qemu_programs` is the folder of the newer QEMU."""
    found = [Contender(f"tapfs {engine}", ("raw", "qcow"), tapfs(engine)) for engine in ("auto", "native", "pyfuse3")]
    daemon = None if qemu_programs is None else shutil.which("qemu-storage-daemon", path=str(qemu_programs))
    daemon = daemon or shutil.which("qemu-storage-daemon")
    if daemon is not None:
        version = subprocess.run([daemon, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
        found.append(Contender(f"qsd {version}", ("raw", "qcow"), storage_daemon(daemon)))
    if shutil.which("nbdkit") and shutil.which("nbdfuse"):
        found.append(Contender("nbdfuse+nbdkit", ("raw",), _nbdfuse))
    return found


def tapfs(engine: str, *, writable: bool = True) -> Callable[[Path, str, Path], Generator[Path]]:
    """`tapfs mount` with an engine."""
    program = TAPFS

    def serve(image: Path, image_format: str, folder: Path) -> Generator[Path]:
        folder.mkdir()
        command = [
            program,
            "mount",
            "--rw" if writable else "--ro",
            "-f",
            image_format,
            "--engine",
            engine,
            str(image),
            str(folder),
        ]
        subprocess.run(command, check=True)
        try:
            yield folder / "disk"
        finally:
            subprocess.run([program, "umount", str(folder)], check=True)

    return serve


def storage_daemon(
    program: str, *, iothreads: int = 0, writable: bool = True
) -> Callable[[Path, str, Path], Generator[Path]]:
    """The FUSE export of a qemu-storage-daemon; without iothreads its main loop serves."""
    threads = [f"thread{number}" for number in range(iothreads)]
    served_by = [f"iothread{'' if iothreads == 1 else f'.{n}'}={name}" for n, name in enumerate(threads)]
    on_off = "on" if writable else "off"
    access = f"read-only={'off' if writable else 'on'}"

    def serve(image: Path, image_format: str, folder: Path) -> Generator[Path]:
        folder.mkdir()
        target = folder / "disk"
        target.touch()
        command = [
            program,
            *(word for name in threads for word in ("--object", f"iothread,id={name}")),
            *("--blockdev", f"driver=file,node-name=file,filename={image},{access}"),
            *("--blockdev", f"driver={image_format},node-name=disk,file=file,{access}"),
            "--export",
            ",".join([f"type=fuse,id=export,node-name=disk,mountpoint={target}", f"writable={on_off}", *served_by]),
        ]
        yield from _background(command, target)

    return serve


def _nbdfuse(image: Path, image_format: str, folder: Path) -> Generator[Path]:
    assert image_format == "raw"
    folder.mkdir()
    target = folder / "disk"
    target.touch()
    yield from _background(["nbdfuse", str(target), "--command", "nbdkit", "-s", "file", str(image)], target)


def _background(command: list[str], target: Path) -> Generator[Path]:
    """Serve with a program that stays in the foreground until it is told to end."""
    # QEMU 11 repeats for ever on stderr that its mount is gone.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not os.path.ismount(target):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"bench: {command[0]} did not mount {target}")
                time.sleep(0.05)
            yield target
        finally:
            subprocess.run(["fusermount3", "-u", str(target)], check=False)
            process.terminate()


@contextmanager
def served(contender: Contender, image: Path, image_format: str, folder: Path) -> Generator[Path]:
    """The flat file while the contender serves the image; `folder` must not exist."""
    yield from contender.serve(image, image_format, folder)
