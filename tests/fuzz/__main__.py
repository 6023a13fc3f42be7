"""Fuzz the drivers until interrupted, or for so many inputs: `make fuzz`, or a part of it.

    python -m tests.fuzz --only qcow2 --runs 100000 --corpus build/fuzz

An input that fails is kept in the folder as crash-…; name it to have it done again. Options of libFuzzer come after --.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import atheris

_FORMATS = ("qcow", "qcow2", "vdi", "vhd", "vhdx", "vmdk")


def main(words: list[str]) -> None:
    """Fuzz; the process ends with the status of libFuzzer."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="FORMAT", choices=_FORMATS, nargs="+", default=list(_FORMATS))
    parser.add_argument("--runs", metavar="N", type=int, default=-1, help="inputs (default: until interrupted)")
    parser.add_argument("--seconds", metavar="S", type=int, default=0, help="the longest that it goes on; 0: for ever")
    parser.add_argument("--corpus", metavar="DIR", type=Path, help="where inputs that reach new code are kept")
    parser.add_argument("again", metavar="INPUT", type=Path, nargs="*", help="an input to be done again, or an option")
    arguments = parser.parse_args(words)
    with atheris.instrument_imports(include=["tapfs.formats"]):
        from tests.fuzz.edits import try_one

    def one(data: bytes) -> None:
        try_one(atheris.FuzzedDataProvider(data), arguments.only)

    options = [f"-runs={arguments.runs}", f"-max_total_time={arguments.seconds}", "-timeout=20"]
    options += ["-rss_limit_mb=2048", "-max_len=256", "-len_control=0"]
    if arguments.corpus is not None:
        arguments.corpus.mkdir(parents=True, exist_ok=True)
        options += [f"-artifact_prefix={arguments.corpus}{os.sep}", str(arguments.corpus)]
    atheris.Setup([sys.argv[0], *options, *map(str, arguments.again)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
