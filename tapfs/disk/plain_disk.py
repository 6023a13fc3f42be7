"""Plain disks: those that are as long as their host file, so another length of the file is another size of the disk."""

from __future__ import annotations

from tapfs.driver import Checkable, Driver


def is_plain(driver: Driver) -> bool:
    """Whether the image is the disk and nothing else. A fixed VHD is the disk with a footer behind it."""
    return driver.geometry.identity is not None and not isinstance(driver, Checkable)
