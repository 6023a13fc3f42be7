"""Install what a host needs besides the Python package: a unit for systemd, and the block script for xl."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from tapfs.errors import CODES, ErrorKind, ImageError, from_os_error

_UNIT_NAME = "tapfs-blktapctrl.service"
_SCRIPT_NAME = "block-tapfs"
_SCRIPTS = "etc/xen/scripts"
#: The folders for units of an administrator and of a package.
_UNITS, _PACKAGED_UNITS = "etc/systemd/system", "usr/lib/systemd/system"

#: Of root's rights the service keeps those over files of others, SYS_ADMIN for the marks on images, SYS_MODULE for
#: xen-blkback, SYS_NICE and SYS_RESOURCE for what disks are limited to. The process of a disk gives up more.
CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID"),
    *("SYS_ADMIN", "SYS_MODULE", "SYS_NICE", "SYS_RESOURCE"),
)

# KillMode=process: what ends the supervisor without its doing must not end the disks; it ends them itself when it is
# to stop, and the next one takes over what is left. The supervisor loads xen-blkback itself: a driver that is loaded
# takes every disk which has none at that moment. So calls of the group @module are left. Images may lie on the network,
# whose file systems are the kernel's: the service itself has no network.
# Guests of libvirt and of xendomains need their disks, so those services start after this one and stop before it, as
# does the one that runs block scripts in a driver domain. What would give the service a view of its own of devices or
# mounts is left out: disks outlive it, and images are mounted later. PrivateMounts=no is for versions of systemd that
# make one where the network is private.
_UNIT = """\
[Unit]
Description=Disks of Xen guests, served by tapfs
Documentation=man:xl-disk-configuration(5)
ConditionPathExists=/proc/xen/capabilities
After=xenstored.service xen-init-dom0.service xen.service
Wants=network-online.target
After=network-online.target remote-fs.target
Before=xendomains.service xendriverdomain.service libvirtd.service virtxend.service
StartLimitIntervalSec=0

[Service]
Type=notify
EnvironmentFile=-/etc/default/tapfs
ExecStartPre=-/sbin/modprobe -a xen-gntdev xen-evtchn
ExecStart={command} blktapctrl
Restart=always
RestartSec=2
RestartPreventExitStatus={another_runs}
KillMode=process
TimeoutStopSec=120
LimitNOFILE=1048576
LimitMEMLOCK=infinity
LimitCORE=0
TasksMax=infinity
NoNewPrivileges=yes
CapabilityBoundingSet={capabilities}
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
ProtectHostname=yes
PrivateNetwork=yes
PrivateMounts=no
IPAddressDeny=any
RestrictAddressFamilies=AF_UNIX
SystemCallArchitectures=native
SystemCallFilter=~@clock @cpu-emulation @debug @mount @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
"""


def unit_of(command: str) -> str:
    """The text of the unit, where `command` is tapfs as a shell would start it."""
    return _UNIT.format(
        command=command.replace("%", "%%"),
        another_runs=CODES[ErrorKind.LOCKED].exit_code,
        capabilities=" ".join(f"CAP_{name}" for name in CAPABILITIES),
    )


def install(root: str) -> list[str]:
    """Install the unit and the link to the block script below `root`; "/" is this host.

    Returns the paths, for the operator to see. Raises ImageError(not_found, denied, io).
    """
    script = _installed_script()
    unit = Path(root, _UNITS if Path(root) == Path("/") else _PACKAGED_UNITS, _UNIT_NAME)
    link = Path(root, _SCRIPTS, _SCRIPT_NAME)
    # -P: what lies in the working directory is no part of tapfs.
    command = shlex.join([sys.executable, "-P", "-m", "tapfs.cli"])
    text = unit_of(command)
    try:
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text(text)
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f"{_SCRIPT_NAME}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(script)
        new.replace(link)
    except OSError as error:
        raise from_os_error(error, path=os.fsdecode(error.filename or root), op="install it") from error
    return [str(unit), str(link)]


def _installed_script() -> Path:
    """The console script of this installation of tapfs; else the one in PATH."""
    beside = Path(sys.executable).with_name(_SCRIPT_NAME)
    if beside.exists():
        return beside
    found = shutil.which(_SCRIPT_NAME)
    if found is None:
        raise ImageError(
            ErrorKind.NOT_FOUND,
            "is not installed",
            path=str(beside),
            op="install",
            remedy="install tapfs with pip first",
        )
    return Path(found).absolute()
