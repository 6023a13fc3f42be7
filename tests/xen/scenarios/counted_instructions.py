"""The processor time of `processor_time` on a machine whose clock goes by the instructions that it executes.

What else the host does changes nothing then. A system call or a page fault costs its instructions alone: what switching
page tables costs a processor is left out, which `processor_time` has in it.
"""

from __future__ import annotations

from tests.laboratory.scenario import scenario
from tests.xen.scenarios import processor_time
from tests.xen.scenarios.dom0 import Dom0


@scenario(300)
def beside_blkback(dom0: Dom0) -> str | None:
    return processor_time.beside_blkback.run(dom0)
