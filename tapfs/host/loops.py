"""Find the loop device that shows a host file. Users of a loop device take no image locks, so locks cannot tell.

Linux names the file behind each device in /sys. The device is not found if its file was renamed since, or if another
mount namespace shows the file. A file on a FUSE mount is looked at only for a file of that mount: the mount may be one
that this process is about to serve, and would wait for.
"""

from __future__ import annotations

import os

_BLOCK_DEVICES = "/sys/block"
_MOUNTS = "/proc/self/mountinfo"

#: Characters that stand as three octal digits in the names of mount points.
_ESCAPED = b" \t\n\\"


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
                path = backing.read().removesuffix(b"\n")
            if _waits_for_others(path, identity[0]):
                continue
            status = os.stat(path)
        except (OSError, ValueError):
            continue  # gone meanwhile, or not to be seen from here
        if (status.st_dev, status.st_ino) == identity:
            return f"/dev/{device}"
    return None


def _waits_for_others(path: bytes, device: int) -> bool:
    """Whether a look at a path goes through a FUSE mount that is not the file system `device`. Raises OSError."""
    with open(_MOUNTS, "rb") as mounts:
        for line in mounts:
            placed, _, kind = line.partition(b" - ")
            _, _, number, _, point, *_ = placed.split(b" ")
            if not kind.startswith(b"fuse"):
                continue
            for character in _ESCAPED:
                point = point.replace(b"\\%03o" % character, bytes([character]))
            major, _, minor = number.partition(b":")
            if path.startswith(point + b"/") and os.makedev(int(major), int(minor)) != device:
                return True
    return False
