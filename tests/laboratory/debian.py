"""Debian's packages for the laboratory: chosen by apt as the machine is configured, unpacked, not installed.

No maintainer script runs and nothing is written outside the given folders, so that any user can do it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.laboratory.errors import LabError

HYPERVISOR = "xen-hypervisor-4.17-amd64"
KERNEL = "linux-image-amd64"
#: A newer kernel, of security updates: Debian's 6.1 has no ublk.
NEWER_KERNEL = "linux-image-6.12-amd64"
#: The newest kernel, of these backports: its name is that of its release, and it comes in three packages.
NEWEST_SUITE = "trixie-backports"
NEWEST_KERNEL = "linux-image-amd64"
NEWEST_PARTS = ("linux-base", "linux-binary", "linux-modules")
# Xen's tools, the device model and the firmware of HVM guests, the boot loader of PV guests,
# Python and the engine's and libfuse's libraries, shells for libxl's scripts, what makes and checks file systems.
DOM0 = (
    "xen-utils-4.17",
    "xenstore-utils",
    "qemu-system-xen",
    "seabios",
    "grub-xen-host",
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
    "xfsprogs",
    "dmsetup",
    "libdeflate0",
    "libssl3",
    "zlib1g",
    "libzstd1",
    "libfuse3-3",
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


class NewestKernel:
    """The newest kernel of Debian's backports, by lists of packages of its own in `folder`. Raises LabError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._settings: list[str] = []

    def choose(self) -> list[str]:
        """The packages that it comes in, with their version: NAME=VERSION."""
        mirror = self._mirror()
        (self._folder / "lists/partial").mkdir(parents=True, exist_ok=True)
        sources = self._folder / "sources.list"
        line = f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {NEWEST_SUITE} main\n"
        sources.write_text(line, encoding="utf-8")
        settings = [
            f"Dir::Etc::sourcelist={sources}",
            "Dir::Etc::sourceparts=/dev/null",
            f"Dir::State::lists={self._folder}/lists",
            f"Dir::Cache={self._folder}",
            "Dir::State::status=/dev/null",
            "APT::Sandbox::User=root",
        ]
        self._settings = [word for setting in settings for word in ("-o", setting)]
        found = self._found()
        if found is None:
            self._apt("apt-get", "update", "-q")
            found = self._found()
        if found is None:
            raise LabError(f"{mirror} has no {NEWEST_KERNEL} in {NEWEST_SUITE}")
        return found

    def download(self, names: Sequence[str], folder: Path) -> list[Path]:
        """Fetch and verify these packages into `folder`, where only they remain."""
        wanted = {f"{name.replace('=', '_')}_amd64.deb".replace(":", "%3a") for name in names}
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.deb"):
            if old.name not in wanted:
                old.unlink()
        answer = self._apt("apt-get", "download", "-q", *names, place=folder)
        missing = sorted(wanted - {path.name for path in folder.glob("*.deb")})
        if missing:
            shutil.rmtree(self._folder)  # the mirror has gone on: look anew the next time
            raise LabError(f"apt-get did not download {missing[0]}: {answer.stderr.strip()[-300:]} (try again)")
        return [folder / name for name in sorted(wanted)]

    def _found(self) -> list[str] | None:
        depends = self._apt("apt-cache", "depends", NEWEST_KERNEL).stdout
        release = re.search(r"Depends: linux-image-([0-9]\S*-amd64)$", depends, re.MULTILINE)
        if release is None:
            return None
        shown = self._apt("apt-cache", "show", f"{NEWEST_PARTS[0]}-{release[1]}").stdout
        version = re.search(r"^Version: (\S+)$", shown, re.MULTILINE)
        return None if version is None else [f"{part}-{release[1]}={version[1]}" for part in NEWEST_PARTS]

    def _apt(self, *command: str, place: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LC_ALL": "C"}
        words = [command[0], *self._settings, *command[1:]]
        return subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=place)

    @staticmethod
    def _mirror() -> str:
        """That of the machine's own apt configuration."""
        targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
        answer = subprocess.run(targets, capture_output=True, text=True, check=False)
        mirrors = [line for line in answer.stdout.split() if "debian" in line and "security" not in line]
        if not mirrors:
            raise LabError("apt knows no mirror of Debian (try: apt-get update)")
        return mirrors[0]


def unpack(package: Path, folder: Path) -> None:
    """Lay a package's files into `folder`, through the symbolic links that it has for folders (/lib to /usr/lib)."""
    tar = ["tar", "-x", "-C", str(folder), "--keep-directory-symlink", *(f"--exclude={path}" for path in LEFT_OUT)]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as source:
        subprocess.run(tar, stdin=source.stdout, check=True)
    if source.returncode != 0:
        raise LabError(f"{package}: dpkg-deb cannot unpack it")
