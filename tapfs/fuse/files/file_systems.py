"""The types of file systems, and how each is mounted: by the kernel, or by a FUSE file system of another package.

A read-only mount never needs the journal replayed, because a read-only disk could not take the replay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tapfs.host.fuse_connection import escaped


class KernelType(NamedTuple):
    """The kernel's name for a type; the options for a read-only mount, and those for every mount."""

    name: str
    read_only: tuple[str, ...] = ()
    always: tuple[str, ...] = ()


class Program(NamedTuple):
    """A FUSE file system. It stays in the foreground with `foreground`, so that we see it end.

    `options` are for every mount, `read_only` and `writable` for those. One that does not
    name the file that it reads in the mount table (`names_file`) is told to. `lets_others_in`: it always
    does, and the modes of its files decide.
    """

    name: str
    package: str
    foreground: str
    options: tuple[str, ...] = ()
    read_only: tuple[str, ...] = ("ro",)
    writable: tuple[str, ...] = ("rw",)
    names_file: bool = False
    flags: tuple[str, ...] = ()
    lets_others_in: bool = False

    def command(self, node: str, mountpoint: str, *, writable: bool, more: Iterable[str]) -> list[str]:
        """The words that start it."""
        options = [*self.options, *(self.writable if writable else self.read_only), *more]
        if not self.names_file:
            options += [f"fsname={escaped(node)}", f"subtype={self.name}"]
        # fuseiso takes options after the names only, the others take them there, too.
        return [self.name, *self.flags, node, mountpoint, self.foreground, "-o", ",".join(options)]


# The driver of ext4 serves ext2 and ext3, too, and takes `noload` for all of them. Two copies of one
# XFS have the same UUID, which is no reason to refuse the second.
_EXT = KernelType("ext4", read_only=("noload",))
_KERNEL: Mapping[str, KernelType] = {
    "ext2": _EXT,
    "ext3": _EXT,
    "ext4": _EXT,
    "xfs": KernelType("xfs", read_only=("norecovery",), always=("nouuid",)),
    "btrfs": KernelType("btrfs", read_only=("rescue=nologreplay",)),
    "ntfs": KernelType("ntfs3"),
}

# `fakeroot`: who may read the image may read all files in it.
_FUSE2FS = Program("fuse2fs", "fuse2fs", "-f", ("fakeroot",), ("ro", "norecovery"), names_file=True)
_PROGRAMS: Mapping[str, Program] = {
    "ext2": _FUSE2FS,
    "ext3": _FUSE2FS,
    "ext4": _FUSE2FS,
    "ntfs": Program("ntfs-3g", "ntfs-3g", "-n", ("no_detach",), names_file=True, lets_others_in=True),
    "vfat": Program("fusefat", "fusefat", "-f", (), ("ro",), ("rw+",)),
    "squashfs": Program("squashfuse", "squashfuse", "-f"),
    # -n: it keeps no list of mounts in the home directory, which need not be there.
    "iso9660": Program("fuseiso", "fuseiso", "-f", flags=("-n",)),
}

#: The types that libblkid calls file systems. Whoever has parsed a stranger's image may name these, and no other one
#: that the kernel would load a module for.
TYPES = frozenset(
    {
        *("ext2", "ext3", "ext4", "ext4dev", "xfs", "exfs", "btrfs", "bcachefs", "f2fs", "nilfs2", "jfs", "zonefs"),
        *("reiserfs", "reiser4", "gfs", "gfs2", "ocfs", "ocfs2", "oracleasm", "scoutfs", "ubifs", "mpool"),
        *("vfat", "exfat", "ntfs", "ReFS", "hpfs", "hfs", "hfsplus", "apfs", "VMFS", "nss", "befs", "bfs", "minix"),
        *("ufs", "sysv", "xenix", "vxfs", "iso9660", "udf", "squashfs", "squashfs3", "erofs", "cramfs", "romfs"),
    }
)

#: Types that nobody can write.
READ_ONLY_TYPES = frozenset({"iso9660", "squashfs", "erofs", "udf", "cramfs"})

#: Types without owners of their own: uid, gid and umask are options of theirs.
OWNERLESS_TYPES = frozenset({"vfat", "exfat", "ntfs", "ntfs3", "hfs"})


def kernel_type(type_name: str) -> KernelType:
    """How the kernel mounts what blkid calls `type_name`."""
    return _KERNEL.get(type_name, KernelType(type_name))


def program_for(type_name: str) -> Program | None:
    """The FUSE file system for what blkid calls `type_name`, if we know one."""
    return _PROGRAMS.get(type_name)
