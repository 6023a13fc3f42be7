"""Programs of tests/native, each with a part of the engine in it, under a sanitizer.

The engine is compiled once for each sanitizer, into an archive for each folder of kernel/src, in build/native. A
program takes of the archives what it calls. `--wrap` works as with objects: calls change when the program is linked.
Programs of tests/fuzz/native are made of the same archives, or by clang of others that count what an input reaches.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
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
    above: Path = REPOSITORY / "tests/native",
) -> Path:
    """The program of the files `names` of tests/native, or of another folder, built in `folder`.

    `parts` are the folders of kernel/src that it is linked of, all of them without a word. Calls of the functions
    `wrapped` reach the program. The sources `instead` are taken in place of those of the same functions.
    """
    archives = engine_archives(sanitizer)
    output = folder / names[0]
    chosen = [archives / f"{part}.a" for part in parts] or sorted(archives.glob("*.a"))
    sources = [*(above / f"{name}.c" for name in names), *instead]
    link(output, sources, chosen, ["gcc", *_sanitized(sanitizer), *(f"-Wl,--wrap={name}" for name in wrapped)])
    return output


def link(output: Path, sources: Sequence[Path], archives: Sequence[Path], compiler: Sequence[str]) -> None:
    """Make a program of sources and archives by a compiler with its options."""
    command: list[str | Path] = [*compiler, *_FLAGS, "-o", output, f"-I{SOURCES}", *sources]
    command += ["-Wl,--start-group", *archives, "-Wl,--end-group", *_LIBRARIES]
    subprocess.run(command, check=True)


def require_no_report(folder: Path, *names: str, sanitizer: str, rounds: int) -> None:
    """Run a program of threads on a disk in `folder`: it ends well, and its sanitizer says nothing."""
    job = program(folder, *names, sanitizer=sanitizer)
    done = subprocess.run([job, folder / "disk", str(rounds)], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def require_race_is_seen(folder: Path, *names: str, source: str, without: Sequence[str]) -> None:
    """Run the same with these calls taken out of a file of kernel/src: ThreadSanitizer reports a race."""
    text = (SOURCES / source).read_text()
    for call in without:
        assert call in text
        text = text.replace(call, "")
    broken = folder / Path(source).name
    broken.write_text(text)
    job = program(folder, *names, sanitizer=THREADS, instead=[broken])
    # At the first report: a program whose data such a race has spoilt may go round in circles.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    command = [job, folder / "disk", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr


def _sanitized(sanitizer: str) -> list[str]:
    return [f"-fsanitize={sanitizer}"] if sanitizer else []


def engine_archives(sanitizer: str, compiler: str = "gcc") -> Path:
    """The folder with an archive for each folder of kernel/src, made anew for new sources. Processes take turns."""
    sources = sorted(SOURCES.rglob("*.[ch]"))
    state = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    kind = sanitizer.replace(",", "-") or "plain"
    kind = kind if compiler == "gcc" else f"{compiler}-{kind}"
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
                words = [compiler, *_sanitized(sanitizer)]
                made = list(pool.map(lambda source: _compiled(source, making, words), SOURCES.glob("*/*.c")))
            for part in {each.parent for each in made}:
                objects = [each for each in made if each.parent == part]
                subprocess.run(["ar", "rcs", part.with_suffix(".a"), *objects], check=True)
            making.rename(ready)
    return ready


def _compiled(source: Path, folder: Path, compiler: Sequence[str]) -> Path:
    output = folder / source.relative_to(SOURCES).with_suffix(".o")
    output.parent.mkdir(exist_ok=True)
    command: list[str | Path] = [*compiler, *_FLAGS, f"-I{SOURCES}", "-c", "-o", output, source]
    subprocess.run(command, check=True)
    return output
