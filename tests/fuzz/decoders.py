"""Fuzz the engine's decoders of what strangers send, by libFuzzer under sanitizers, or by a sample of inputs.

    python -m tests.fuzz.decoders --only nbd vhost --seconds 60 --corpus build/fuzz/decoders

Each program of tests/fuzz/native takes any bytes and ends itself where something does not hold. The inputs that reach
different code are kept in fixtures/fuzz. `--sample` needs no clang: gcc builds, and damage of the kept inputs is tried.
An input that fails is kept in the folder as crash-…; name it behind `--again` to have it done again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests import native_programs
from tests.conftest import REPOSITORY

NATIVE = REPOSITORY / "tests/fuzz/native"
KEPT = REPOSITORY / "fixtures/fuzz"
#: What libFuzzer adds to the code of the engine, and to the program.
_COUNTED, _LINKED = "fuzzer-no-link,address,undefined", "fuzzer,address,undefined"
#: An input takes microseconds. A machine that does other things may hold one up: it fails if it takes as long again.
_LONGEST_SECONDS = 10
_MEMORY_MIB = 1024
_SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:handle_abort=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}
#: The inputs that were done so far, and the input that took too long.
_DONE = re.compile(r"^(?:Done |#)(\d+)", re.MULTILINE)
_SLOW = re.compile(r"Test unit written to (.*/timeout-\w+)$", re.MULTILINE)


class Decoder(NamedTuple):
    """A program: the longest input that it is given, and whether it serves a disk of tests/native."""

    longest: int
    served: bool = False


DECODERS = {
    "codecs": Decoder(4096),
    "packer": Decoder(4096),
    "tables": Decoder(8192),
    "references": Decoder(2048),
    "nbd": Decoder(4096, served=True),
    "vhost": Decoder(8192, served=True),
    "xen_ring": Decoder(8192, served=True),
}


class Fuzzed(NamedTuple):
    """The inputs that a decoder was given, and what the program said if it ended itself."""

    inputs: int
    failure: str | None


def sources(name: str) -> list[Path]:
    """The files of a decoder's program."""
    served = [REPOSITORY / "tests/native/owned_disk.c"] if DECODERS[name].served else []
    return [NATIVE / f"{name}.c", *served]


def sampled(name: str, folder: Path, seed: int, inputs: int) -> Fuzzed:
    """Do the kept inputs of a decoder and as many that differ from them by chance."""
    program = folder / name
    archives = sorted(native_programs.engine_archives(native_programs.MEMORY).glob("*.a"))
    compiler = ["gcc", f"-fsanitize={native_programs.MEMORY}", "-fno-sanitize-recover=undefined"]
    native_programs.link(program, [*sources(name), NATIVE / "replay.c"], archives, compiler)
    kept = folder / f"{name}.inputs"
    unpack(name, kept)
    done = _run([program, kept, str(seed), str(inputs)])
    return Fuzzed(int(done.stdout), None) if done.returncode == 0 else Fuzzed(0, done.stderr)


def build(name: str, folder: Path) -> Path:
    """The program of a decoder with libFuzzer."""
    program = folder / name
    archives = sorted(native_programs.engine_archives(_COUNTED, "clang").glob("*.a"))
    compiler = ["clang", f"-fsanitize={_LINKED}", "-fno-sanitize-recover=undefined"]
    native_programs.link(program, sources(name), archives, compiler)
    return program


def fuzz(program: Path, corpus: Path, seconds: float, seed: int, again: Iterable[Path] = ()) -> Fuzzed:
    """Run libFuzzer in the corpus of a decoder, or give it these inputs alone."""
    end, inputs = time.monotonic() + seconds, 0
    while True:
        words = [f"-seed={seed + inputs}", f"-timeout={_LONGEST_SECONDS}", f"-rss_limit_mb={_MEMORY_MIB}"]
        left = max(1, int(end - time.monotonic()))
        words += [f"-max_total_time={left}", f"-max_len={DECODERS[program.name].longest}"]
        words += [f"-artifact_prefix={corpus}{os.sep}", *(map(str, again) if again else [str(corpus)])]
        done = _run([program, *words])
        inputs += max(map(int, _DONE.findall(done.stderr)), default=0)
        if done.returncode == 0:
            return Fuzzed(inputs, None)
        slow = _SLOW.search(done.stderr)
        if again or slow is None or fuzz(program, corpus, 1, seed, [Path(slow[1])]).failure is not None:
            return Fuzzed(inputs, done.stderr)
        Path(slow[1]).unlink()
        if time.monotonic() >= end:
            return Fuzzed(inputs, None)


def unpack(name: str, folder: Path) -> None:
    """Put the kept inputs of a decoder into a folder, each under a name of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(KEPT / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")


def keep(name: str, program: Path, corpus: Path) -> int:
    """Make the kept inputs anew of those that reach different code; how many they are."""
    with tempfile.TemporaryDirectory(prefix="tapfs-fuzz-") as found:
        _run([program, "-merge=1", f"-max_len={DECODERS[name].longest}", found, str(corpus)]).check_returncode()
        KEPT.mkdir(exist_ok=True)
        inputs = sorted(Path(found).iterdir(), key=lambda path: (path.stat().st_size, path.name))
        with tarfile.open(KEPT / f"{name}.tar.xz", "w:xz", preset=9) as archive:
            for number, path in enumerate(inputs):
                entry = tarfile.TarInfo(f"{number:04}")
                entry.size = path.stat().st_size
                with path.open("rb") as content:
                    archive.addfile(entry, content)
        return len(inputs)


def _run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    # A program that libFuzzer ends takes nothing away.
    with tempfile.TemporaryDirectory(prefix="tapfs-fuzz-") as folder:
        environment = os.environ | _SANITIZERS | {"TMPDIR": folder}
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)


def main(words: list[str]) -> int:
    """Fuzz the decoders one after the other; 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.decoders", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="DECODER", choices=DECODERS, nargs="+", default=list(DECODERS))
    parser.add_argument("--seconds", metavar="S", type=float, default=60, help="for each (default: %(default)g)")
    parser.add_argument("--seed", metavar="N", type=int, default=1)
    parser.add_argument("--corpus", metavar="DIR", type=Path, default=REPOSITORY / "build/fuzz/decoders")
    parser.add_argument("--sample", metavar="N", type=int, help="try so many inputs by chance, without libFuzzer")
    parser.add_argument("--keep", action="store_true", help="make the kept inputs anew at the end")
    parser.add_argument("--again", metavar="INPUT", type=Path, nargs="+", default=[])
    arguments = parser.parse_args(words)
    failed = 0
    for name in arguments.only:
        corpus = arguments.corpus / name
        corpus.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tapfs-fuzz-") as folder:
            if arguments.sample is not None:
                done = sampled(name, Path(folder), arguments.seed, arguments.sample)
            else:
                program = build(name, Path(folder))
                if (KEPT / f"{name}.tar.xz").exists():
                    unpack(name, corpus)
                done = fuzz(program, corpus, arguments.seconds, arguments.seed, arguments.again)
                if arguments.keep and done.failure is None:
                    sys.stdout.write(f"{name}: {keep(name, program, corpus)} inputs are kept\n")
        sys.stdout.write(f"{name}: {done.inputs} inputs\n")
        if done.failure is not None:
            failed = 1
            sys.stdout.write(f"{done.failure[-6000:]}\nFAILED: {name}: its input is in {corpus}\n")
        sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
