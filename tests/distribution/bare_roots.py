"""Each package of `make dist`, installed into a bare Debian or Ubuntu and used there.

usage: python -m tests.distribution.bare_roots DIST [NAME...]

A root is made once by mmdebstrap (build/roots) and is the lower layer of an overlay: every run finds it as it was.
It needs root, and has no compiler. Names: wheel-bookworm, wheel-trixie, wheel-noble (Ubuntu 24.04), deb-bookworm,
deb-trixie, deb-noble, demo-trixie, wheel-aarch64, storage-sid (systemd's storage providers), systemd-trixie and
systemd-sid, whose systemd boots and runs the units of the package, and guests-disk: the unit for guests' disks of this
working tree, under the systemd of this machine's root, which is the lower layer then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.distribution import under_systemd
from tests.distribution.booted_root import run_booted

REPOSITORY = Path(__file__).parents[2]
ROOTS = REPOSITORY / "build/roots"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

_OF_UBUNTU = ("noble",)

#: Packages of Python for the other machine.
_FOREIGN = (
    *("libc6", "libgcc-s1", "libssl3", "libexpat1", "zlib1g", "libffi8", "libbz2-1.0", "liblzma5", "libuuid1"),
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libnettle8"),
)

#: An image of every writable kind is made, checked and read back.
USE = r"""
set -eu
: "${formats:=qcow qcow2 vmdk vhd vhdx vdi}"
cd "$(mktemp -d)"
! command -v gcc && ! command -v cc
tapfs --version
head -c 3000000 /dev/urandom > data.raw
truncate -s 8M data.raw
for format in $formats; do
    tapfs convert -f raw -O $format data.raw disk.$format
    tapfs check disk.$format
    tapfs compare -f raw -F $format data.raw disk.$format
done
tapfs convert -c -O qcow2 -o compression_type=zstd disk.vdi packed.qcow2
tapfs compare packed.qcow2 disk.vdi
printf 'secret\n' > key
tapfs create -f qcow2 --encrypt -o encrypt.iter-time=10 --key-file key locked.qcow2 1M
tapfs info --key-file key locked.qcow2 > /dev/null
"""
#: The disk for clients, one of which is another tapfs.
SERVE = r"""
set -eu
cd "$(mktemp -d)"
tapfs create -f qcow2 disk.qcow2 8M
tapfs serve disk.qcow2 --socket "$PWD/socket" > served & server=$!
while ! [ -s served ]; do sleep 0.1; done
tapfs compare -f raw "nbd+unix:///?socket=$PWD/socket" disk.qcow2
kill $server; wait $server || true
"""
#: The disk by FUSE, read and written; the files inside by the kernel.
MOUNT = r"""
set -eu
cd "$(mktemp -d)"
mkdir tree disk files
echo hello > tree/file
truncate -s 16M fs.raw
mke2fs -q -t ext4 -d tree fs.raw
tapfs convert -f raw -O qcow2 fs.raw disk.qcow2
tapfs mount --rw disk.qcow2 disk
cmp disk/disk fs.raw
dd if=/dev/zero of=disk/disk bs=4096 seek=4000 count=1 conv=notrunc status=none
tapfs list
tapfs umount disk
tapfs check disk.qcow2
tapfs mount --files disk.qcow2 files
grep hello files/file
tapfs umount files
"""
#: What the package of Debian has besides.
PACKAGE = r"""
set -eu
cd "$(mktemp -d)"
mkdir there
tapfs create -f qcow2 disk.qcow2 1M
mount -t tapfs -o ro,format=qcow2 "$PWD/disk.qcow2" "$PWD/there"
test -f there/disk
umount there
test -e /usr/share/man/man1/tapfs-mount.1.gz
test -x "$(readlink -f /etc/xen/scripts/block-tapfs)"
python3 -c 'import tapfs; print(tapfs.info("disk.qcow2")["format"])'
find /usr/lib/python3/dist-packages/tapfs -name '*.pyc' | grep -q entry
"""
#: A double click, by somebody who is not root.
DESKTOP = r"""
set -eu
cd "$(mktemp -d)"
mkdir tree session programs
echo hello > tree/file
truncate -s 16M fs.raw
mke2fs -q -t ext4 -d tree fs.raw
tapfs convert -f raw -O vmdk fs.raw 'a disk.vmdk'
printf '#!/bin/sh\ncat "$1/file"\n' > programs/xdg-open
chmod 755 programs/xdg-open .
chmod 700 session
chown -R nobody .
mknod -m 666 fuse c 10 229  # as udev makes it, whatever this machine has
mount --bind fuse /dev/fuse
as_nobody() {
    setpriv --reuid=nobody --regid=nogroup --clear-groups env HOME="$PWD" XDG_RUNTIME_DIR="$PWD/session" \
        PATH="$PWD/programs:/usr/bin:/bin" "$@"
}
click() { as_nobody /usr/lib/tapfs/mount-files "$@"; }
test "$(click 'a disk.vmdk')" = hello
click --unmount 'a disk.vmdk'
test -z "$(ls session/tapfs-files)"
# By the type of the file, which its first bytes tell, as file managers do it.
mv 'a disk.vmdk' 'no ending'
as_nobody gio open 'no ending' > shown
until grep hello shown; do sleep 0.1; done
click --unmount 'no ending'
test -z "$(ls session/tapfs-files)"
"""


#: Images as volumes of systemd, by its own client.
STORAGE = r"""
set -eu
cd "$(mktemp -d)"
mkdir images tree
echo hello > tree/file
truncate -s 16M fs.raw
mke2fs -q -t ext4 -d tree fs.raw
tapfs convert -f raw -O vhdx fs.raw images/disk.vhdx
mkdir -p /run/systemd/io.systemd.StorageProvider
tapfs provide images --socket /run/systemd/io.systemd.StorageProvider/tapfs & provider=$!
while ! storagectl providers | grep -w tapfs; do sleep 0.1; done
storagectl volumes --json=short | grep '"disk.vhdx"'
storagectl templates --no-pager | grep qcow2
address=/run/systemd/io.systemd.StorageProvider/tapfs
varlinkctl introspect $address io.systemd.StorageProvider > ours
varlinkctl introspect exec:/usr/lib/systemd/systemd-storage-fs io.systemd.StorageProvider > theirs
grep -v '#' theirs | tr -d ' \t\n' > theirs.words
grep -v '#' ours | tr -d ' \t\n' > ours.words
cmp ours.words theirs.words
mkdir there
mount -t storage.ext4 -o ro tapfs:disk.vhdx there
grep hello there/file
umount there
mount -t storage.ext4 tapfs:disk.vhdx there
echo more > there/more
umount there
varlinkctl call $address io.systemd.StorageProvider.Acquire \
    '{"name":"new.qcow2","createMode":"new","createSizeBytes":1048576}'
kill $provider
wait $provider || true
while ! tapfs check images/disk.vhdx; do sleep 0.1; done
tapfs info images/new.qcow2
"""


@contextmanager
def bare_root(release: str, *packages: str) -> Iterator[Path]:
    """A root of that release with those packages, thrown away afterwards."""
    lower = ROOTS / "-".join([release, *packages])
    if not lower.exists():
        ROOTS.mkdir(parents=True, exist_ok=True)
        fresh = lower.with_name(f"{lower.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        include = ",".join(["ca-certificates", *packages])
        options = ["--quiet", "--variant=apt", f"--include={include}", *_options_of(release)]
        subprocess.run(["mmdebstrap", *options, release, fresh], check=True)
        fresh.rename(lower)
    with over(lower) as root:
        (root / "dist").mkdir()
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        if not (root / "etc/mtab").is_symlink():  # an init makes it, which fusermount3 counts on
            (root / "etc/mtab").symlink_to("../proc/self/mounts")
        shutil.copy(_CERTIFICATES, root / str(_CERTIFICATES)[1:])
        yield root


@contextmanager
def over(lower: Path) -> Iterator[Path]:
    """A root that begins as `lower`, and is thrown away afterwards."""
    # In memory: the upper layer may not lie on an overlay, as the disk of a container is.
    with tempfile.TemporaryDirectory(prefix="tapfs-root-", dir="/dev/shm") as name:
        scratch, root = Path(name), Path(name, "root")
        for folder in ("upper", "work", "root"):
            (scratch / folder).mkdir()
        layers = f"lowerdir={lower},upperdir={scratch / 'upper'},workdir={scratch / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, root], check=True)
        try:
            yield root
        finally:
            # What a script that failed has left running is being killed, and may hold it for a moment.
            subprocess.run(["umount", "--lazy", root], check=True)


def _options_of(release: str) -> list[str]:
    """What mmdebstrap has to be told of a release."""
    if release == "sid":  # a mirror may be a picture of another day
        return ['--aptopt=Acquire::Check-Valid-Until "false"']
    if release not in _OF_UBUNTU:
        return []
    # Debian 12 has no keys of Ubuntu's archive; Debian 13 has, in a package.
    keys = REPOSITORY / "build/ubuntu-keyring"
    if not keys.exists():
        unpack = [REPOSITORY / "scripts/foreign-packages", "amd64", "trixie", keys, "ubuntu-keyring"]
        subprocess.run(unpack, check=True, stdout=subprocess.DEVNULL)
    found = keys / "root/usr/share/keyrings/ubuntu-archive-keyring.gpg"
    return [f"--keyring={found}", "--components=main,universe"]


def run_in(root: Path, script: str, *, path: str = "") -> None:
    """Run a script there, in namespaces of its own, so that nothing that it mounts or leaves running is left."""
    around = (
        "mount -t proc proc {0}/proc && mount --rbind /dev {0}/dev && mount -t tmpfs tmpfs {0}/tmp"
        " && exec chroot {0} sh -c {1}"
    )
    environment = {
        "PATH": f"{path}/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    environment |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    command = around.format(root, '"$1"')
    unshared = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", command, "sh", script]
    done = subprocess.run(
        unshared,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{script}\nended with {done.returncode}:\n{done.stdout[-6000:]}")


def copied(dist: Path, pattern: str, root: Path) -> str:
    """The path in the root of the only file of `dist` that fits."""
    (found,) = dist.glob(pattern)
    shutil.copy(found, root / "dist")
    return f"/dist/{found.name}"


def wheel(release: str, dist: Path) -> None:
    """The wheel needs no compiler, and mounts: it brings pyfuse3."""
    with bare_root(release, "python3-venv", "e2fsprogs") as root:
        name = copied(dist, "*_x86_64.whl", root)
        run_in(root, f"python3 -m venv /venv && /venv/bin/pip install -q {name}")
        for script in (USE, SERVE, MOUNT):
            run_in(root, script, path="/venv/bin:")


def package(release: str, dist: Path) -> None:
    """The package of Debian brings all that it needs."""
    with bare_root(release, "e2fsprogs") as root:
        name = copied(dist, "*_amd64.deb", root)
        run_in(root, f"apt-get update -qq && apt-get install -y -qq {name}")
        for script in (USE, SERVE, MOUNT, PACKAGE):
            run_in(root, script)
        run_in(root, "apt-get install -y -qq fuse2fs libglib2.0-bin shared-mime-info desktop-file-utils")
        run_in(root, DESKTOP)


def storage(release: str, dist: Path) -> None:
    """Clients of systemd find and mount the images that `tapfs provide` offers."""
    with bare_root(release, "python3-venv", "e2fsprogs", "mount", "systemd-sysv", "systemd-container") as root:
        name = copied(dist, "*_x86_64.whl", root)
        run_in(root, f"python3 -m venv /venv && /venv/bin/pip install -q {name}")
        run_in(root, STORAGE, path="/venv/bin:")


def units(release: str, dist: Path) -> None:
    """The package's units under a systemd that has booted; volumes where it knows them."""
    with bare_root(release, "e2fsprogs", "mount", "systemd-sysv", "systemd-container") as root:
        name = copied(dist, "*_amd64.deb", root)
        run_in(root, f"apt-get update -qq && apt-get install -y -qq {name}")
        knows_volumes = (root / "usr/bin/storagectl").exists()
        volumes = under_systemd.VOLUMES if knows_volumes else ""
        said = run_booted(root, under_systemd.MOUNTS + under_systemd.UNITS + volumes + under_systemd.LEFT)
        sys.stdout.write("".join(line for line in said.splitlines(keepends=True) if "exposure level" in line))
        run_in(root, under_systemd.AFTERWARDS)


def guests_disk(_: Path) -> None:
    """The unit that `tapfs blktapctrl --install` makes serves a disk of a simulated machine."""
    with over(Path("/")) as root:
        drop_in = root / "etc/systemd/system/tapfs-blktapctrl.service.d/simulated.conf"
        drop_in.parent.mkdir(parents=True)
        environment = f"TAPFS_XEN_MACHINE=/run/machine TAPFS_RUNTIME_DIR=/run/machine/run PYTHONPATH={REPOSITORY}"
        drop_in.write_text(f"[Unit]\nConditionPathExists=\n[Service]\nEnvironment={environment}\n")
        run_booted(root, under_systemd.GUESTS_DISK.format(python=sys.executable, environment=environment))


def demo(release: str, dist: Path) -> None:
    """The first command of README, in the unpacked sdist."""
    with bare_root(release, "make") as root:
        name = copied(dist, "*.tar.gz", root)
        run_in(root, f"cd /root && tar xzf {name} && cd tapfs-* && apt-get update -qq && make demo")


def foreign(dist: Path) -> None:
    """The wheel of the other machine, with Debian's Python for it, in an emulator: this machine's kernel runs both.

    What tapfs starts itself, as it does to serve, would not be emulated.
    """
    with tempfile.TemporaryDirectory(prefix="tapfs-aarch64-") as name:
        root = Path(name)
        unpack = [REPOSITORY / "scripts/foreign-packages", "arm64", "bookworm", root / "usr-of-aarch64", *_FOREIGN]
        subprocess.run(unpack, check=True, stdout=subprocess.DEVNULL)
        system, site = root / "usr-of-aarch64/root", root / "site"
        (found,) = dist.glob("*_aarch64.whl")
        platforms = [f"--platform={tag}_aarch64" for tag in ("manylinux_2_28", "manylinux2014", "manylinux_2_17")]
        words = ["--target", site, "--only-binary", ":all:", "--python-version", "3.11", *platforms, found]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *words], check=True)
        emulator = f"qemu-aarch64-static -L {system} -E PYTHONPATH={site} {system}/usr/bin/python3.11"
        (root / "tapfs").write_text(f'#!/bin/sh\nexec {emulator} -m tapfs.cli "$@"\n')
        (root / "tapfs").chmod(0o755)
        load = f"{emulator} -P -c 'from tapfs.host.fuse_binding import pyfuse3'"
        subprocess.run(load, shell=True, env=os.environ | {"PYTHONHOME": f"{system}/usr"}, check=True)  # noqa: S602
        script = USE.replace("! command -v gcc && ! command -v cc\n", "")
        environment = os.environ | {"PATH": f"{root}:{os.environ['PATH']}", "PYTHONHOME": f"{system}/usr"}
        environment["formats"] = "qcow2 vdi"  # each command takes seconds
        done = subprocess.run(
            ["sh", "-c", script], env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            sys.exit(f"{script}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")


RUNS: dict[str, Callable[[Path], None]] = {
    "wheel-bookworm": lambda dist: wheel("bookworm", dist),
    "wheel-trixie": lambda dist: wheel("trixie", dist),
    "wheel-noble": lambda dist: wheel("noble", dist),
    "deb-bookworm": lambda dist: package("bookworm", dist),
    "deb-trixie": lambda dist: package("trixie", dist),
    "deb-noble": lambda dist: package("noble", dist),
    "storage-sid": lambda dist: storage("sid", dist),
    "systemd-trixie": lambda dist: units("trixie", dist),
    "systemd-sid": lambda dist: units("sid", dist),
    "guests-disk": guests_disk,
    "demo-trixie": lambda dist: demo("trixie", dist),
    "wheel-aarch64": foreign,
}


def main(words: list[str]) -> int:
    """Run all, or those that are named."""
    if not words or set(words[1:]) - RUNS.keys():
        sys.exit(__doc__)
    for name in words[1:] or RUNS:
        RUNS[name](Path(words[0]).absolute())
        sys.stdout.write(f"{name}: passed\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
