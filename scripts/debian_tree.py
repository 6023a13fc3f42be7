"""Build tapfs with the libraries of this host and lay it out below ROOT as a package of Debian has it.

usage: debian_tree.py ROOT [WHEEL]    (debian/rules calls it; without a WHEEL it makes one, by setuptools and cffi)

Python's part goes to usr/lib/python3/dist-packages, programs get Debian's interpreter, and mount(8) finds its helper.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PROGRAM = """\
#!/usr/bin/python3 -P
import sys

from {module} import {function}

sys.exit({function}())
"""
#: Where a program lies that is no user's command.
FOLDERS = {"block-tapfs": "usr/lib/tapfs", "mount.fuse.tapfs": "usr/sbin"}
LINKS = {
    "usr/sbin/mount.tapfs": "mount.fuse.tapfs",
    "etc/xen/scripts/block-tapfs": "/usr/lib/tapfs/block-tapfs",
}
#: Files of ours by the folders that they go to.
FURTHER = {
    "usr/lib/systemd/system": [
        "packaging/tapfs-mount@.service",
        "packaging/tapfs-volumes.socket",
        "packaging/tapfs-volumes.service",
    ],
    "usr/lib/tapfs": ["packaging/mount-files"],
    "usr/share/applications": ["packaging/tapfs-mount-files.desktop"],
    "usr/share/mime/packages": ["packaging/tapfs.xml"],
}
#: A folder for what an administrator writes.
EMPTY = "etc/tapfs"
UNIT = "usr/lib/systemd/system/tapfs-blktapctrl.service"


def unpack_wheel(folder: Path, wheel: Path | None) -> None:
    """Unpack the wheel into `folder`, or one that is built now."""
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        return
    with tempfile.TemporaryDirectory(prefix="tapfs-deb-") as name:
        program = f"from setuptools import build_meta; print(build_meta.build_wheel({name!r}))"
        # Of a Python that is not Debian's, the flags for linking would name its own folders.
        flags = os.environ | {"CC": "cc", "LDSHARED": "cc -shared"}
        subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY, env=flags, stdout=subprocess.DEVNULL, check=True
        )
        unpack_wheel(folder, next(Path(name).glob("*.whl")))


def write_program(path: Path, target: str) -> None:
    """Write the program of an entry point, as in ``tapfs.cli.entry:tapfs``."""
    module, function = target.split(":")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PROGRAM.format(module=module, function=function))
    path.chmod(0o755)


def main(root: Path, wheel: Path | None) -> int:
    """Lay it out."""
    packages = root / "usr/lib/python3/dist-packages"
    packages.mkdir(parents=True, exist_ok=True)
    unpack_wheel(packages, wheel)
    (data,) = packages.glob("*.data")
    shutil.copytree(data / "data/share", root / "usr/share", dirs_exist_ok=True)
    shutil.rmtree(data)
    zsh = root / "usr/share/zsh"
    (zsh / "site-functions").rename(zsh / "vendor-completions")
    (about,) = packages.glob("*.dist-info")
    entries = configparser.ConfigParser(delimiters=("=",))
    entries.optionxform = str  # names as they stand
    entries.read(about / "entry_points.txt")
    for name, target in entries["console_scripts"].items():
        write_program(root / FOLDERS.get(name, "usr/bin") / name, target)
    # The texts are in usr/share/doc, as debian/copyright.
    shutil.rmtree(about / "licenses")
    (about / "RECORD").unlink()
    for name, pointed in LINKS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(pointed)
    for folder, names in FURTHER.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            source = REPOSITORY / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, root / folder / source.name)
    (root / EMPTY).mkdir(parents=True, exist_ok=True)
    program = "from tapfs.xen.supervisor.install import unit_of; print(unit_of('/usr/bin/tapfs'), end='')"
    path = os.environ | {"PYTHONPATH": str(packages)}
    unit = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=path, capture_output=True, text=True, check=True
    )
    (root / UNIT).write_text(unit.stdout)
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]) if len(sys.argv) == 3 else None))
