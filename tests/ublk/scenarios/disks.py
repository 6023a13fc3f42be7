"""Block devices in scenarios on any kernel: making images, summing files, killing processes under load."""

from __future__ import annotations

import subprocess
import time

from tests.laboratory.commands import PATIENCE, run, say, tapfs
from tests.ublk.scenarios.block_devices import IMAGES, BlockDevices

MOUNT = "/run/mounted"
TREE = "/payload/site-packages/tapfs"


def new_image(name: str, mebibytes: int, format_name: str = "qcow2") -> str:
    """A new empty image; its path."""
    path = IMAGES / name
    path.unlink(missing_ok=True)
    tapfs("create", "-f", format_name, str(path), f"{mebibytes}M")
    return str(path)


def sum_of(folder: str) -> str:
    """A number that depends on the name and content of each file below a folder."""
    return run("sh", "-c", f"cd {folder} && find . -type f | sort | xargs md5sum | md5sum")


def kill_under_load(host: BlockDevices, device: str, *, times: int = 2) -> str:
    """Kill -9 under write load: users see a pause, and every write that they were told of is there; what it says."""
    with subprocess.Popen(["disk-load", "write", device, "8", "16", "7"], stdout=subprocess.PIPE, text=True) as load:
        for _ in range(times):
            time.sleep(2)
            say(f"kill -9; {host.kill(device)} serves now")
        said: str = load.communicate(timeout=60 * PATIENCE)[0].strip()
    assert load.returncode == 0, said
    return said.splitlines()[-1]
