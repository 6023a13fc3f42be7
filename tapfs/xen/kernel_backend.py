"""Take devices from xen-blkback, the kernel's own backend, which takes every disk of libxl's where it is loaded."""

from __future__ import annotations

import time
from pathlib import Path

from tapfs.errors import from_os_error
from tapfs.serving.log import log
from tapfs.xen.device import Device

_BUS = Path("/sys/bus/xen-backend")
_KERNEL_DRIVER = "vbd"

#: For how long the kernel may take to notice a device that we have noticed.
_KERNEL_SECONDS = 1.0
_LOOK_SECONDS = 0.02


def take_from_kernel(device: Device, *, seconds: float = _KERNEL_SECONDS) -> None:
    """Have xen-blkback let go of a device of libxl's, if it takes it within so many seconds. Raises ImageError."""
    if not (_BUS / "drivers" / _KERNEL_DRIVER).exists():
        return
    name = f"{device.kind}-{device.domain}-{device.number}"
    driver = _BUS / "devices" / name / "driver"
    patience = time.monotonic() + seconds
    while not driver.exists():
        if time.monotonic() > patience:
            return
        time.sleep(_LOOK_SECONDS)
    try:
        (driver / "unbind").write_text(name)
    except FileNotFoundError:
        return  # it has let go by itself
    except OSError as error:
        raise from_os_error(error, path=str(driver / "unbind"), op="take the disk from xen-blkback") from error
    log.info("%s: taken from xen-blkback", device)


def letting_go() -> tuple[str, ...]:
    """What is written to have xen-blkback let go of a device: a file, or where that will be when it is loaded."""
    drivers = _BUS / "drivers"
    file = drivers / _KERNEL_DRIVER / "unbind"
    return (str(file if file.exists() else drivers),)
