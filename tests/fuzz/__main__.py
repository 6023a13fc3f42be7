"""Fuzz the drivers until interrupted, or for so many inputs: `make fuzz`, or a part of it.

    python -m tests.fuzz --only qcow2 --runs 100000 --corpus build/fuzz

The writable drivers are fuzzed without a word, and what tapfs only reads with `--read-only`: other formats, packed
streams, packages, partition tables and file systems. An input that fails is kept in the folder as crash-…; name it to
have it done again, with the same words. Options of libFuzzer come after --.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

from tapfs.kernel.crc32c import use_instruction

_FORMATS = ("qcow", "qcow2", "vdi", "vhd", "vhdx", "vmdk")
_READ_ONLY = (
    *("qed", "parallels", "dmg", "ewf", "luks", "gz", "bz2", "xz", "zst", "ova", "xva", "vmx", "vbox"),
    *("ext2", "ext4", "xfs", "ntfs", "fat", "dos", "gpt"),
)
#: What is of Python, and looks at bytes of strangers.
_LOOKED_AT = ["tapfs.formats", "tapfs.partitions", "tapfs.packages", "tapfs.host.packed", "tapfs.disk"]
#: What an input costs is bounded in time of the processor. On a machine that does much else only a hang takes so long.
_LONGEST_SECONDS = 300


def main(words: list[str]) -> None:
    """Fuzz; the process ends with the status of libFuzzer."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*_FORMATS, *_READ_ONLY]
    parser.add_argument("--only", metavar="KIND", choices=known, nargs="+", help=", ".join(known))
    parser.add_argument("--read-only", action="store_true", help="all kinds that are only read")
    parser.add_argument("--runs", metavar="N", type=int, default=-1, help="inputs (default: until interrupted)")
    parser.add_argument("--seconds", metavar="S", type=int, default=0, help="the longest that it goes on; 0: for ever")
    parser.add_argument("--corpus", metavar="DIR", type=Path, help="where inputs that reach new code are kept")
    parser.add_argument("again", metavar="INPUT", type=Path, nargs="*", help="an input to be done again, or an option")
    arguments = parser.parse_args(words)
    kinds: list[str] = arguments.only or list(_READ_ONLY if arguments.read_only else _FORMATS)
    with atheris.instrument_imports(include=_LOOKED_AT if {*kinds} & {*_READ_ONLY} else _LOOKED_AT[:1]):
        from tests.fuzz import edits, read_only
    use_instruction()
    # libFuzzer ends the process, so nobody else would take the folder away.
    folder = Path(tempfile.mkdtemp(prefix="tapfs-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def one(data: bytes) -> None:
        given = atheris.FuzzedDataProvider(data)
        kind = kinds[given.ConsumeIntInRange(0, len(kinds) - 1)]
        if kind in _READ_ONLY:
            read_only.try_one(given, [kind], folder)
        else:
            edits.try_one(given, [kind])

    options = [f"-runs={arguments.runs}", f"-max_total_time={arguments.seconds}", f"-timeout={_LONGEST_SECONDS}"]
    options += ["-rss_limit_mb=2048", "-max_len=256", "-len_control=0"]
    if arguments.corpus is not None:
        arguments.corpus.mkdir(parents=True, exist_ok=True)
        options += [f"-artifact_prefix={arguments.corpus}{os.sep}", str(arguments.corpus)]
    atheris.Setup([sys.argv[0], *options, *map(str, arguments.again)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
