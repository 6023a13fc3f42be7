"""The start of each command: processor time, beside Python's own start and `qemu-img`. `make bench-startup`.

A command that works on an image does so on an empty qcow2 of 1 MiB, the others print their help. The tapfs that is
measured is the one that is installed beside this Python.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tapfs.cli.main import COMMANDS

#: Words of commands that do their work; IMAGE is an image, NEW a name that is free, FOLDER an empty folder.
WORKING: dict[str, tuple[str, ...]] = {
    "info": ("IMAGE",),
    "map": ("IMAGE",),
    "check": ("IMAGE",),
    "compare": ("IMAGE", "IMAGE"),
    "measure": ("-O", "qcow2", "IMAGE"),
    "create": ("-f", "qcow2", "NEW", "1M"),
    "convert": ("-O", "raw", "IMAGE", "NEW"),
    "snapshot": ("-l", "IMAGE"),
    "survey": ("FOLDER",),
    "formats": (),
    "list": (),
    "stats": (),
}


def words_of(command: str, folder: Path) -> list[str]:
    """The words of a command line that ends by itself, and leaves nothing that the next one minds."""
    names = {"IMAGE": str(folder / "disk.qcow2"), "NEW": str(folder / "new"), "FOLDER": str(folder / "empty")}
    (folder / "new").unlink(missing_ok=True)
    return [command, *(names.get(word, word) for word in WORKING.get(command, ("--help",)))]


def processor_ms(words: list[str]) -> float:
    """Milliseconds of processor time of a command, with byte code where Python wants it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="a command")
    parser.add_argument("--tapfs", type=Path, default=Path(sys.executable).with_name("tapfs"))
    arguments = parser.parse_args()
    python = str(arguments.tapfs.with_name("python"))
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as name:
        folder = Path(name)
        (folder / "empty").mkdir()
        image = folder / "disk.qcow2"
        subprocess.run([arguments.tapfs, "create", "-q", "-f", "qcow2", image, "1M"], check=True)
        rows = {"python -c pass": [python, "-c", "pass"], "qemu-img info": ["qemu-img", "info", str(image)]}
        for row, words in rows.items():
            found[row] = statistics.median(processor_ms(words) for _ in range(arguments.rounds))
        for command in COMMANDS if arguments.only is None else [arguments.only]:
            processor_ms([str(arguments.tapfs), *words_of(command, folder)])  # its byte code
            each = [processor_ms([str(arguments.tapfs), *words_of(command, folder)]) for _ in range(arguments.rounds)]
            found[f"tapfs {command}"] = statistics.median(each)
    for row, value in found.items():
        print(f"{row:<22}{value:7.0f} ms")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
