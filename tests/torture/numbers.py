"""The numbers of `make torture` as a file: what each part did when it ran last, on which machine."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.conftest import REPOSITORY


@dataclass(frozen=True)
class Record:
    """One part: when it ran, on what, in how many processes, for how long, and what it counted."""

    date: str
    machine: str
    processes: int
    seconds: int
    runs: int
    failures: int
    counts: Mapping[str, int]


def read(path: Path) -> dict[str, Record]:
    """The records of a file, by the names of their parts; none where there is no file."""
    if not path.is_file():
        return {}
    return {name: Record(**record) for name, record in json.loads(path.read_text(encoding="utf-8")).items()}


def write(path: Path, records: Mapping[str, Record]) -> None:
    """Write the records, whole or not at all."""
    new = path.with_suffix(".new")
    text = json.dumps({name: asdict(record) for name, record in sorted(records.items())}, indent=1)
    new.write_text(f"{text}\n", encoding="utf-8")
    new.replace(path)


def now() -> str:
    """Today, and the commit that is checked out."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()
    return f"{time.strftime('%Y-%m-%d', time.gmtime())} {commit}".strip()


def machine() -> str:
    """The processors, the memory and the kernel of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    release = os.uname().release.split("-")[0]
    return f"{os.cpu_count()} processors, {memory:.0f} GiB, Linux {release}"
