"""Build the laboratory from Debian's packages, once for each set of their versions: build/xenlab/KEY.

A finished folder holds
  xen           the hypervisor
  linux         the kernel of dom0 and of the guests
  dom0.cpio     the initramfs that mounts dom0's file systems
  dom0.img      dom0's root file system; /guest holds the guests' kernel and initramfs
  newer-linux   a newer kernel, packed, which is booted without Xen
  newer.cpio    the initramfs that mounts dom0's file systems under it
  newest-linux, newest.cpio   the same of the newest kernel that Debian's backports have
  packages.txt  what it is made of
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.laboratory import debian
from tests.laboratory.errors import LabError
from tests.laboratory.initramfs import Archive
from tests.laboratory.kernel_image import Modules, unpack_kernel

HERE = Path(__file__).parent
TREE = HERE.parents[1]
CACHE = TREE / "build/xenlab"
ROOT_FILE_SYSTEM_BYTES = 2 << 30
FOLDERS = ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64")
# For dom0's initramfs, for dom0 itself, and for the initramfs of the guests.
# ext4 and libcrc32c, which XFS needs, ask the kernel for crc32c by name: no dependency that depmod sees.
EXT4 = ("crc32c_generic", "ext4")
BOOT_MODULES = ("virtio_pci", "virtio_blk", *EXT4)
XEN_MODULES = ("xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs", "xen-blkback", "xen-blkfront")
DOM0_MODULES = (*XEN_MODULES, "loop", "9p", "9pnet_virtio", *EXT4)
GUEST_MODULES = ("xen-blkfront", *EXT4)
# For newer kernels, all from their initramfs: dom0's file system has the modules of the other one.
HOST_MODULES = ("virtio_pci", "virtio_blk", "9p", "9pnet_virtio", "loop", "ublk_drv")
NEWER_MODULES = (*HOST_MODULES, "dm-log-writes", "dm-flakey", "fuse", *EXT4, "xfs")
NEWEST_MODULES = (*HOST_MODULES, "ext4")
BUILDERS = ("build.py", "debian.py", "kernel_image.py", "initramfs.py", "dom0/initramfs-init", "guest/init")


@dataclass(frozen=True, slots=True)
class Lab:
    """A finished laboratory."""

    folder: Path

    @property
    def hypervisor(self) -> Path:
        return self.folder / "xen"

    @property
    def kernel(self) -> Path:
        return self.folder / "linux"

    @property
    def initramfs(self) -> Path:
        return self.folder / "dom0.cpio"

    def host(self, kernel: str) -> tuple[Path, Path]:
        """Of a kernel that is booted without Xen, "newer" or "newest": the kernel and its initramfs."""
        return self.folder / f"{kernel}-linux", self.folder / f"{kernel}.cpio"

    @property
    def root(self) -> Path:
        return self.folder / "dom0.img"


def build(say: Callable[[str], None]) -> Lab:
    """The laboratory, built if these versions of the packages and of the builder have not been built yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="empty-") as empty:
            packages = debian.choose(Path(empty))
        newest = debian.NewestKernel(CACHE / "newest")
        newest_packages = newest.choose()
        folder = CACHE / f"lab-{_key([*packages, *newest_packages])}"
        if folder.is_dir():
            return Lab(folder)
        say(f"building the laboratory from {len(packages) + len(newest_packages)} packages of Debian")
        archives = debian.download(CACHE / "packages", packages)
        newest_archives = newest.download(newest_packages, CACHE / "newest-packages")
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as temporary:
            made = Path(temporary) / "lab"
            made.mkdir()
            _Builder(Path(temporary), made).build(archives, newest_archives)
            for old in CACHE.glob("lab-*"):
                shutil.rmtree(old)
            made.rename(folder)
        return Lab(folder)


def _key(packages: Sequence[str]) -> str:
    key = hashlib.sha256("\n".join(packages).encode())
    for name in BUILDERS:
        key.update((HERE / name).read_bytes())
    return key.hexdigest()[:16]


class _Builder:
    def __init__(self, temporary: Path, made: Path) -> None:
        self.root = temporary / "root"
        self.linux = temporary / "linux"
        self.newer = temporary / "newer"
        self.newest = temporary / "newest"
        self.xen = temporary / "xen"
        self.made = made

    def build(self, packages: Sequence[Path], newest: Sequence[Path]) -> None:
        for folder in (self.root, self.linux, self.newer, self.newest, self.xen):
            for path in FOLDERS:
                (folder / path).mkdir(parents=True)
                (folder / Path(path).name).symlink_to(path)
        for package in packages:
            debian.unpack(package, self._place(package.name))
        for package in newest:
            debian.unpack(package, self.newest)
        with gzip.open(_only(self.xen / "boot", "xen-*-amd64.gz")) as packed:
            (self.made / "xen").write_bytes(packed.read())
        release = _only(self.linux / "boot", "vmlinuz-*").name.removeprefix("vmlinuz-")
        unpack_kernel(self.linux / "boot" / f"vmlinuz-{release}", self.made / "linux")
        modules = Modules(self.linux, release, self._program("usr/bin/kmod", "depmod"))
        self._dom0_modules(modules, release)
        self._initramfs(self.made / "dom0.cpio", HERE / "dom0/initramfs-init", modules, BOOT_MODULES)
        guest = self.root / "guest"
        guest.mkdir()
        self._initramfs(guest / "initramfs", HERE / "guest/init", modules, GUEST_MODULES)
        shutil.copy(self.made / "linux", guest / "linux")
        release = _only(self.newer / "boot", "vmlinuz-*").name.removeprefix("vmlinuz-")
        self._host_kernel("newer", self.newer, release, self.newer / f"boot/vmlinuz-{release}", NEWER_MODULES)
        release = _only(self.newest / "lib/modules", "*").name
        kernel = self.newest / f"lib/modules/{release}/vmlinuz"
        self._host_kernel("newest", self.newest, release, kernel, NEWEST_MODULES)
        self._complete_root()
        with (self.made / "dom0.img").open("wb") as image:
            image.truncate(ROOT_FILE_SYSTEM_BYTES)
        make = ["mke2fs", "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d", str(self.root)]
        subprocess.run([*make, str(self.made / "dom0.img")], check=True)
        (self.made / "packages.txt").write_text("".join(f"{package.name}\n" for package in packages), encoding="utf-8")

    def _host_kernel(self, name: str, tree: Path, release: str, kernel: Path, names: Sequence[str]) -> None:
        """A kernel that is booted without Xen, packed as it is, and its initramfs."""
        shutil.copy(kernel, self.made / f"{name}-linux")
        modules = Modules(tree, release, self._program("usr/bin/kmod", "depmod"))
        self._initramfs(self.made / f"{name}.cpio", HERE / "dom0/initramfs-init", modules, names)

    def _place(self, package: str) -> Path:
        if package.startswith(debian.NEWER_KERNEL.removesuffix("-amd64")):
            return self.newer
        if package.startswith("linux-image"):
            return self.linux
        if package.startswith((debian.HYPERVISOR, *debian.NOT_UNPACKED)):
            return self.xen
        return self.root

    def _program(self, path: str, name: str) -> list[str]:
        """The command line of a program of dom0's, run here by dom0's own loader with dom0's libraries."""
        libraries = f"{self.root}/usr/lib/x86_64-linux-gnu"
        loader = [f"{self.root}/usr/lib64/ld-linux-x86-64.so.2", "--library-path", libraries]
        return [*loader, "--argv0", name, f"{self.root}/{path}"]

    def _dom0_modules(self, modules: Modules, release: str) -> None:
        target = self.root / "lib/modules" / release
        for path in (*modules.closure(DOM0_MODULES), "modules.builtin", "modules.order", "modules.builtin.modinfo"):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(modules.folder / path, target / path)
        subprocess.run([*self._program("usr/bin/kmod", "depmod"), "-b", str(self.root), release], check=True)

    def _initramfs(self, path: Path, init: Path, modules: Modules, names: Sequence[str]) -> None:
        archive = Archive()
        archive.folder("bin", "dev", "proc", "sys", "mnt", "tmp", "etc", "modules")
        archive.character_device("dev/console", 5, 1)
        archive.character_device("dev/null", 1, 3)
        archive.file("bin/busybox", (self.root / "bin/busybox").read_bytes())
        for applet in self._applets():
            archive.link(f"bin/{applet}", "busybox")
        order = modules.closure(names)
        for module in order:
            archive.file(f"modules/{Path(module).name.removesuffix('.xz')}", modules.content(module), 0o644)
        names = "".join(f"{Path(module).name.removesuffix('.xz')}\n" for module in order)
        archive.file("modules/order", names.encode(), 0o644)
        archive.file("init", init.read_bytes())
        path.write_bytes(archive.content())

    def _applets(self) -> list[str]:
        listing = subprocess.run([self.root / "bin/busybox", "--list"], capture_output=True, text=True, check=True)
        return [name for name in listing.stdout.split() if name != "busybox"]

    def _complete_root(self) -> None:
        """What maintainer scripts would have done, as far as anything here needs it."""
        for path in ("dev", "proc", "sys", "run", "tmp", "root", "share", "payload", "var/lib", "var/log/xen", "etc"):
            (self.root / path).mkdir(parents=True, exist_ok=True)
        (self.root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n", encoding="ascii")
        (self.root / "etc/group").write_text("root:x:0:\ndisk:x:6:\n", encoding="ascii")
        (self.root / "etc/mtab").symlink_to("/proc/self/mounts")
        for place, name in (("run", "var/run"), ("run/lock", "var/lock")):
            if not (self.root / name).is_symlink():
                (self.root / name).rmdir()
                (self.root / name).symlink_to(f"/{place}")
        for applet in ("sh", *self._applets()):
            places = (self.root / "usr/bin" / applet, self.root / "usr/sbin" / applet)
            if not any(place.exists() or place.is_symlink() for place in places):
                places[0].symlink_to("dash" if applet == "sh" else "busybox")
        library = _only(self.root / "usr/lib", "python3.*")
        compile_all = ["-E", "-m", "compileall", "-q", "-s", str(self.root), str(library)]
        python = self._program(f"usr/bin/{library.name}", f"{self.root}/usr/bin/{library.name}")
        subprocess.run([*python, *compile_all], check=False, stdout=subprocess.DEVNULL)
        if not any(library.glob("__pycache__/os.*.pyc")):
            raise LabError(f"dom0's Python does not run here: {library}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise LabError(f"expected one {pattern} among Debian's packages, found {len(found)}")
    return found[0]
