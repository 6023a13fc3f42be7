"""Programs of tests/native, each with a part of the engine in it, under a sanitizer.

The engine is compiled once for each sanitizer, into an archive for each folder of kernel/src, in build/native. A
program takes of the archives what it calls. `--wrap` works as with objects: calls change when the program is linked.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import REPOSITORY

SOURCES = REPOSITORY / "kernel/src"
MEMORY = "address,undefined"
THREADS = "thread"
#: What the mover may know: it is linked of these folders alone, without any front end.
MOVER_FOLDERS = ("engine", "host", "mover")
_FLAGS = ("-D_GNU_SOURCE", "-std=gnu11", "-O1", "-g")
_LIBRARIES = ("-ldeflate", "-lcrypto", "-lz", "-lzstd", "-lpthread", "-ldl")


def program(
    folder: Path,
    *names: str,
    sanitizer: str = "",
    parts: Sequence[str] = (),
    wrapped: Sequence[str] = (),
    instead: Sequence[Path] = (),
) -> Path:
    """The program of the files `names` of tests/native, built in `folder`.

    `parts` are the folders of kernel/src that it is linked of, all of them without a word. Calls of the functions
    `wrapped` reach the program. The sources `instead` are taken in place of those of the same functions.
    """
    archives = _archives(sanitizer)
    output = folder / names[0]
    chosen = [archives / f"{part}.a" for part in parts] or sorted(archives.glob("*.a"))
    command: list[str | Path] = ["gcc", *_FLAGS, *_sanitized(sanitizer), "-o", output]
    command += [f"-Wl,--wrap={name}" for name in wrapped]
    command += [f"-I{SOURCES}", *(REPOSITORY / f"tests/native/{name}.c" for name in names), *instead]
    command += ["-Wl,--start-group", *chosen, "-Wl,--end-group", *_LIBRARIES]
    subprocess.run(command, check=True)
    return output


def _sanitized(sanitizer: str) -> list[str]:
    return [f"-fsanitize={sanitizer}"] if sanitizer else []


def _archives(sanitizer: str) -> Path:
    """The folder with an archive for each folder of kernel/src, made anew for new sources. Processes take turns."""
    sources = sorted(SOURCES.rglob("*.[ch]"))
    state = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    kind = sanitizer.replace(",", "-") or "plain"
    above = REPOSITORY / "build/native"
    above.mkdir(parents=True, exist_ok=True)
    ready = above / f"{kind}-{state}"
    with (above / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.is_dir():
            for old in above.glob(f"{kind}-*"):
                shutil.rmtree(old)
            making = above / f"new-{kind}"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            with ThreadPoolExecutor(2) as pool:
                made = list(pool.map(lambda source: _compiled(source, making, sanitizer), SOURCES.glob("*/*.c")))
            for part in {each.parent for each in made}:
                objects = [each for each in made if each.parent == part]
                subprocess.run(["ar", "rcs", part.with_suffix(".a"), *objects], check=True)
            making.rename(ready)
    return ready


def _compiled(source: Path, folder: Path, sanitizer: str) -> Path:
    output = folder / source.relative_to(SOURCES).with_suffix(".o")
    output.parent.mkdir(exist_ok=True)
    command: list[str | Path] = ["gcc", *_FLAGS, *_sanitized(sanitizer), f"-I{SOURCES}", "-c", "-o", output, source]
    subprocess.run(command, check=True)
    return output
