"""The library of tests/native/host_faults.c: how it is built, how a process starts with it, how faults are set."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
_SOURCE = REPOSITORY / "tests/native/host_faults.c"
_VARIABLE = "TAPFS_HOST_FAULTS"

#: The rates that a run may set, in parts per thousand of the engine's calls.
RATES = ("read", "write", "cut", "truncate", "punch", "sync", "memory", "metadata")


class _Faults(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("metadata_low", ctypes.c_uint64),
        ("metadata_high", ctypes.c_uint64),
        *((rate, ctypes.c_uint32) for rate in RATES),
        ("cut_bytes", ctypes.c_uint32),
        ("no_holes", ctypes.c_uint32),
        ("delay_microseconds", ctypes.c_uint32),
        ("poison", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("injected", ctypes.c_uint64),
        ("refused_memory", ctypes.c_uint64),
        ("only", ctypes.c_void_p),
        ("at", ctypes.c_uint64),
        ("calls", ctypes.c_uint64),
    )


def build(target: Path) -> Path:
    """Compile the library into the folder `target`."""
    library = target / "host_faults.so"
    command = ["gcc", "-D_GNU_SOURCE", "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", library, _SOURCE], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """The environment of a process that is to run with the library."""
    return os.environ | {"LD_PRELOAD": str(library), _VARIABLE: str(library), "PYTHONPATH": str(REPOSITORY)}


def is_loaded() -> bool:
    """Whether this process was started with the library."""
    return _VARIABLE in os.environ


def folder() -> Path:
    """The folder of the library."""
    return Path(os.environ[_VARIABLE]).parent


@cache
def loaded() -> Interposer:
    """The library of this process."""
    return Interposer()


class Interposer:
    """The faults of this process, which was started with `environment`. At first there are none."""

    def __init__(self) -> None:
        library = ctypes.CDLL(os.environ[_VARIABLE])
        self._restart = library.faults_restart
        self._restart.argtypes = [ctypes.c_uint64]
        self._restart.restype = None
        self._faults = _Faults.in_dll(library, "faults")
        import tapfs.kernel._engine  # noqa: F401  it has to be mapped

        self._faults.low, self._faults.high = _mapped("_engine.abi3.so")
        self._faults.metadata_low, self._faults.metadata_high = _mapped("libpython", os.path.realpath(sys.executable))
        self._faults.poison = 1
        self._rate = RATES[0]

    @property
    def injected(self) -> int:
        """How many faults there were so far."""
        return int(self._faults.injected)

    def counts(self) -> dict[str, int]:
        """The faults so far, by the words of `make torture`."""
        memory = int(self._faults.refused_memory)
        return {"calls of the host failed": self.injected - memory, "allocations failed": memory}

    def restart(self, seed: int) -> None:
        """Begin the sequence of faults that belongs to a seed."""
        self._restart(seed)

    def host(self, *, no_holes: bool = False, cut_bytes: int = 1, delay_microseconds: int = 0) -> None:
        """What kind of host it is from now on."""
        self._faults.no_holes = no_holes
        self._faults.cut_bytes = cut_bytes
        self._faults.delay_microseconds = delay_microseconds

    @contextmanager
    def at(self, rates: dict[str, int]) -> Generator[None]:
        """Faults at these rates while the block runs."""
        for rate, per_mille in rates.items():
            setattr(self._faults, rate, per_mille)
        try:
            yield
        finally:
            for rate in RATES:
                setattr(self._faults, rate, 0)

    def aim(self, rate: str, number: int) -> None:
        """Choose the call that fails while `armed`: `number`, from 0, of those that a rate is about."""
        self._rate, self._faults.at, self._faults.calls = rate, number, 0

    @contextmanager
    def armed(self) -> Generator[None]:
        """Only the chosen call fails, if it comes while such blocks run."""
        self._faults.only = ctypes.addressof(self._faults) + getattr(_Faults, self._rate).offset
        try:
            yield
        finally:
            self._faults.only = None

    @property
    def met(self) -> bool:
        """Whether the chosen call came."""
        return int(self._faults.calls) > int(self._faults.at)


def _mapped(*names: str) -> tuple[int, int]:
    """The addresses of the first of these files that is mapped into this process."""
    ranges: dict[str, list[int]] = {}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            ranges.setdefault(fields[5], []).extend(int(end, 16) for end in fields[0].split("-"))
    for name in names:
        for path, ends in ranges.items():
            if name in os.path.basename(path) or name == path:
                return min(ends), max(ends)
    raise AssertionError(f"none of {names} is mapped")
