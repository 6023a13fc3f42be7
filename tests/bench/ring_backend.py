"""`python -m tests.bench.ring_backend MACHINE IMAGE FORMAT GRANTS CPU`: serve one ring of domain 1 on one processor.

A line on stdin (the references of the ring's pages, separated by spaces, and the port) connects it; then it says
"connected" on stdout. The end of stdin ends it, and it prints its counters as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

from tapfs.disk.chain import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.kernel.xen_ring import Grants, Protocol
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.held_requests import HeldRequests
from tapfs.xen.disk.frontend_keys import FrontendKeys, RingKeys
from tapfs.xen.disk.served_disk import ServedDisk


def main(machine: str, image: str, image_format: str, grants: str, processor: str) -> None:
    """Serve until stdin ends."""
    os.sched_setaffinity(0, {int(processor)})
    opened = open_image(image, OpenOptions(format=image_format, writable=True))
    held = HeldRequests("nothing", lambda: None)
    served = ServedDisk(opened, machine=machine, domain=1, limit=RateLimit(), held=held, paused=False)
    with tempfile.TemporaryFile(dir=machine) as journal:
        *references, port = (int(word) for word in sys.stdin.readline().split())
        keys = FrontendKeys(Protocol.NATIVE, grants == "persistent", (RingKeys(tuple(references), port),))
        served.rings.connect(keys, grants=Grants[grants.upper()], journal=journal.fileno())
        print("connected", flush=True)
        sys.stdin.read()
        served.rings.disconnect()
        print(json.dumps(served.statistics()), flush=True)
        served.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
