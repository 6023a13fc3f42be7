"""Equal pages of idle disks, merged by the kernel (KSM): the supervisor switches that on, and never off.

The processes of disks offer their pages (`tapfs.xen.disk.equal_pages`). In a domain 0 nobody else offers any as a rule:
the memory of guests is Xen's.
"""

from __future__ import annotations

import os
from pathlib import Path

from tapfs.serving.log import log

#: The environment variable that leaves the kernel's setting alone where it is "0".
VARIABLE = "TAPFS_MERGE_PAGES"

_SWITCH = Path("/sys/kernel/mm/ksm/run")
_OFF, _ON = "0", "1"


def merge_equal_pages(switch: Path = _SWITCH) -> None:
    """Have the kernel merge pages, unless it does so already, was told to take merged pages apart (2), or cannot."""
    if os.environ.get(VARIABLE) == "0":
        return
    try:
        if switch.read_text(encoding="ascii").strip() != _OFF:
            return
        switch.write_text(_ON, encoding="ascii")
    except OSError as error:
        log.debug("the kernel merges no equal pages: %s", error)
        return
    log.info("the kernel merges equal pages of disks from now on (%s=0 leaves that alone)", VARIABLE)
