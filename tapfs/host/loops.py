"""Find the loop device that shows a host file. Users of a loop device take no image locks, so locks cannot tell.

Linux names the file behind each device in /sys. The device is not found if its file was renamed since, or if another
mount namespace shows the file.
"""

from __future__ import annotations

import os

_BLOCK_DEVICES = "/sys/block"


def loop_device_of(identity: tuple[int, int]) -> str | None:
    """The first loop device over the file with this device and inode, as /dev/loopN; None if there is none."""
    try:
        devices = sorted(os.listdir(_BLOCK_DEVICES))
    except OSError:  # a system without /sys
        return None
    for device in devices:
        if not device.startswith("loop"):
            continue
        try:
            with open(f"{_BLOCK_DEVICES}/{device}/loop/backing_file", "rb") as backing:
                status = os.stat(backing.read().removesuffix(b"\n"))
        except (OSError, ValueError):
            continue  # gone meanwhile, or not to be seen from here
        if (status.st_dev, status.st_ino) == identity:
            return f"/dev/{device}"
    return None
