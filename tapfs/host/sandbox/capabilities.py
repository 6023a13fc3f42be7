"""Capabilities of a root process: it keeps those that its work needs, and can get no other one again."""

from __future__ import annotations

import struct
from collections.abc import Collection

from tapfs.host.sandbox import calls

CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID = 0, 1, 2, 3, 4
SYS_ADMIN, SYS_NICE = 21, 23

#: Those by which root uses files of others: it opens them, and a replaced file keeps its owner and mode. The marks on
#: bases (`tapfs.host.base_marks`) are attributes that only SYS_ADMIN may look at. What else SYS_ADMIN allows is refused
#: by the filter of system calls and by Landlock.
FILES_OF_OTHERS = frozenset({CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SYS_ADMIN})

_HEADER = struct.pack("Ii", 0x20080522, 0)
_LAST_PATH = "/proc/sys/kernel/cap_last_cap"
_USUAL_LAST = 40


def keep_only(kept: Collection[int]) -> bool:
    """Drop every capability of this thread but these, and so of those that it starts. Whether that was done.

    A process without any is left as it is.
    """
    machine = calls.architecture()
    held = _held()
    if machine is None or held == 0:
        return machine is not None
    wanted = held & sum(1 << each for each in kept)
    for capability in range(_last() + 1):
        if not wanted >> capability & 1:
            calls.drop_from_bounding_set(capability)
    calls.clear_ambient_capabilities()
    low, high = wanted & 0xFFFFFFFF, wanted >> 32
    try:
        calls.call(machine.capset, _HEADER, struct.pack("6I", low, low, 0, high, high, 0))
    except OSError:
        return False
    return True


def _held() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("CapPrm:"):
                return int(line.split()[1], 16)
    return 0


def _last() -> int:
    try:
        with open(_LAST_PATH, encoding="ascii") as number:
            return int(number.read())
    except (OSError, ValueError):
        return _USUAL_LAST
