"""Share the disks of libxl's with xen-blkback, the kernel's own backend: load it, and take from it what is ours.

Where it is loaded it takes every new disk of libxl's, and gives it back when told. When it comes it takes every disk
that no driver has, also one that a guest uses: it fails to connect, and closes the disk. So it is to come before the
disks, and where some are there already, while the bus looks for no drivers.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tapfs.errors import from_os_error
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread
from tapfs.xen.device import LIBXL_KIND, Device, is_ours
from tapfs.xen.xenstore.client import Store

_BUS = Path("/sys/bus/xen-backend")
_KERNEL_DRIVER = "vbd"
_MODULE = "xen-blkback"
#: A shell does it, which outlives a kill of this process: a bus that looks for no drivers gives none to any new device.
_LOADING = 'printf 0 >"$1" || exit 125; modprobe -q "$2"; code=$?; printf 1 >"$1" || exit 125; exit $code'
#: Exit codes of the shell from here on: it could not write, or has no modprobe. modprobe's own are smaller.
_NOT_DONE = 125

#: For how long the kernel may take to notice a device that we have noticed.
_KERNEL_SECONDS = 1.0
_LOOK_SECONDS = 0.02


async def load_kernel_backend(store: Store) -> None:
    """Load xen-blkback, unless it is loaded, and leave to it the disks that are not ours. Raises ImageError."""
    if not await in_thread(_load):
        return
    own = await store.own_domain()
    for device in sorted((_BUS / "devices").iterdir()):
        kind, domain, number = device.name.rsplit("-", 2)
        ours = kind == LIBXL_KIND and await is_ours(store, Device(kind, int(domain), int(number), own))
        if not ours and not (device / "driver").exists():
            with suppress(OSError):  # it is gone again
                (_BUS / "drivers_probe").write_text(device.name)


def _load() -> bool:
    """Load it while the bus looks for no drivers; False: it was there already, or this is no host of Xen's."""
    looking = _BUS / "drivers_autoprobe"
    if not looking.exists() or (_BUS / "drivers" / _KERNEL_DRIVER).exists():
        return False
    done = subprocess.run(
        ["/bin/sh", "-c", _LOADING, "sh", looking, _MODULE], check=False, capture_output=True, start_new_session=True
    )
    if done.returncode >= _NOT_DONE:
        said = done.stderr.decode(errors="replace").strip()
        log.warning("cannot load %s: %s; whoever loads it later takes disks from running guests", _MODULE, said)
    return True


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
