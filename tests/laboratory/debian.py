"""Debian's packages for the laboratory: chosen by apt as the machine is configured, unpacked, not installed.

No maintainer script runs and nothing is written outside the given folders, so that any user can do it.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.laboratory.errors import LabError

HYPERVISOR = "xen-hypervisor-4.17-amd64"
KERNEL = "linux-image-amd64"
#: A newer kernel, of security updates: Debian's 6.1 has no ublk.
NEWER_KERNEL = "linux-image-6.12-amd64"
# Xen's tools, the device model and the firmware of HVM guests,
# Python and the engine's libraries, shells for libxl's scripts, what makes and checks file systems.
DOM0 = (
    "xen-utils-4.17",
    "xenstore-utils",
    "qemu-system-xen",
    "seabios",
    "python3",
    "bash",
    "dash",
    "busybox-static",
    "util-linux",
    "mount",
    "sed",
    "grep",
    "kmod",
    "e2fsprogs",
    "libdeflate0",
    "libssl3",
    "zlib1g",
    "libzstd1",
    "libgcc-s1",
)
PACKAGES = (HYPERVISOR, KERNEL, NEWER_KERNEL, *DOM0)
# They come by dependency and are of no use to a system that never installs a package.
NOT_UNPACKED = ("initramfs-tools", "debconf", "dpkg_", "adduser", "ucf", "linux-base", "klibc-utils", "udev_")
LEFT_OUT = ("./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./usr/share/info", "./usr/share/lintian")
_DOWNLOAD = re.compile(r"^'([^']+)' (\S+\.deb) (\d+) ?(\S*)$", re.MULTILINE)


def choose(empty: Path) -> list[str]:
    """The file names, with versions, of all the packages as apt would install them on an empty system.

    `empty` is a folder that holds no package: apt does not name those that it has already.
    """
    found = _choose(empty)
    if not found and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-q"], stdout=subprocess.DEVNULL, check=False)
        found = _choose(empty)
    if not found:
        reason = _apt(empty, "--print-uris").stderr.strip().splitlines()
        raise LabError(f"apt knows no way to {', '.join(PACKAGES)}: {' '.join(reason[-3:])} (try: apt-get update)")
    return found


def _choose(empty: Path) -> list[str]:
    return sorted(name for _, name, _, _ in _DOWNLOAD.findall(_apt(empty, "--print-uris").stdout))


def download(archives: Path, names: Sequence[str]) -> list[Path]:
    """Fetch and verify the packages into `archives`, where only these remain."""
    answer = _apt(archives, "--download-only")
    missing = [name for name in names if not (archives / name).is_file()]
    if answer.returncode != 0 or missing:
        reason = answer.stderr.strip().splitlines() or [f"{len(missing)} packages are missing, e.g. {missing[0]}"]
        raise LabError(f"apt-get did not download the packages: {reason[-1]}")
    for old in archives.glob("*.deb"):
        if old.name not in names:
            old.unlink()
    return [archives / name for name in names]


def _apt(archives: Path, what: str) -> subprocess.CompletedProcess[str]:
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    settings = [
        "Dir::State::status=/dev/null",  # as if nothing were installed
        f"Dir::Cache::archives={archives}",
        "Debug::NoLocking=1",
        "APT::Sandbox::User=root",
        "APT::Install-Recommends=0",
    ]
    options = [word for setting in settings for word in ("-o", setting)]
    command = ["apt-get", "install", "-qq", "-y", what, *options, *PACKAGES]
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def unpack(package: Path, folder: Path) -> None:
    """Lay a package's files into `folder`, through the symbolic links that it has for folders (/lib to /usr/lib)."""
    tar = ["tar", "-x", "-C", str(folder), "--keep-directory-symlink", *(f"--exclude={path}" for path in LEFT_OUT)]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as source:
        subprocess.run(tar, stdin=source.stdout, check=True)
    if source.returncode != 0:
        raise LabError(f"{package}: dpkg-deb cannot unpack it")
