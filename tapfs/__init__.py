"""tapfs: disk images served from userspace.

``with tapfs.open("image.qcow") as disk: disk.read(0, 512)`` opens any image of a known format
with its whole backing chain. `open_file` gives a file object instead, `open_async` is for trio and asyncio.
`info`, `check`, `repair`, `compact`, `create`, `convert`, `measure`, `amend`, `compare`, `diff`, `apply`,
`commit`, `rebase`, `resize`, `mount`, `unmount` and `serve` are the commands of those names.
Errors are `ImageError`, which is an OSError. docs/python.md tells more.
"""

from __future__ import annotations

#: Type checkers take this name for true. Its owner, `typing`, takes longer to load than Ctrl-C to come.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from tapfs.api.async_image import AsyncImage, open_async
    from tapfs.api.bitmaps import (
        add_bitmap,
        bitmaps,
        clear_bitmap,
        disable_bitmap,
        enable_bitmap,
        merge_bitmap,
        read_bitmap,
        remove_bitmap,
        store_bitmap,
    )
    from tapfs.api.chains import commit, rebase
    from tapfs.api.confining import enter_sandbox
    from tapfs.api.differences import apply, diff, write_diff
    from tapfs.api.jobs import amend, check, compact, compare, convert, create, repair
    from tapfs.api.mounts import MountPoint, mount, unmount
    from tapfs.api.opening import info, open, open_file, package_info  # noqa: A004 - `tapfs.open` is the name one expects
    from tapfs.api.passwords import add_password, remove_password
    from tapfs.api.servers import DiskServer, serve
    from tapfs.api.sizes import measure, resize
    from tapfs.api.snapshots import apply_snapshot, create_snapshot, delete_snapshot, snapshots
    from tapfs.api.verification import damaged_files, verify, write_sidecar
    from tapfs.disk.chain_map import MappedExtent
    from tapfs.disk.description import ImageInfo
    from tapfs.disk.disk_file import DiskFile
    from tapfs.disk.image import Image
    from tapfs.disk.package import DiskInPackage, PackageInfo
    from tapfs.disk.password import LayerPasswords
    from tapfs.disk.sidecar import Hashed
    from tapfs.edit_protocols import Bitmap, SnapshotRecord
    from tapfs.errors import ErrorKind, ImageError
    from tapfs.findings import CheckReport
    from tapfs.host.gate import Gate
    from tapfs.jobs.apply import ApplyReport
    from tapfs.jobs.bitmaps import ReadBitmap
    from tapfs.jobs.commit import Committed
    from tapfs.jobs.compact import CompactReport
    from tapfs.jobs.compare import Difference
    from tapfs.jobs.copying import CopyOptions
    from tapfs.jobs.damaged_files import DamagedPart
    from tapfs.jobs.diff import ChangedExtent, DiffReport
    from tapfs.jobs.free_space import FileSystemSpace
    from tapfs.jobs.measure import Measured
    from tapfs.jobs.rebase import Rebased
    from tapfs.jobs.verify import Verdict, Verification

    __version__: str

__all__ = [
    "ApplyReport",
    "AsyncImage",
    "Bitmap",
    "ChangedExtent",
    "CheckReport",
    "Committed",
    "CompactReport",
    "CopyOptions",
    "DamagedPart",
    "DiffReport",
    "Difference",
    "DiskFile",
    "DiskInPackage",
    "DiskServer",
    "ErrorKind",
    "FileSystemSpace",
    "Gate",
    "Hashed",
    "Image",
    "ImageError",
    "ImageInfo",
    "LayerPasswords",
    "MappedExtent",
    "Measured",
    "MountPoint",
    "PackageInfo",
    "ReadBitmap",
    "Rebased",
    "SnapshotRecord",
    "Verdict",
    "Verification",
    "__version__",
    "add_bitmap",
    "add_password",
    "amend",
    "apply",
    "apply_snapshot",
    "bitmaps",
    "check",
    "clear_bitmap",
    "commit",
    "compact",
    "compare",
    "convert",
    "create",
    "create_snapshot",
    "damaged_files",
    "delete_snapshot",
    "diff",
    "disable_bitmap",
    "enable_bitmap",
    "enter_sandbox",
    "info",
    "measure",
    "merge_bitmap",
    "mount",
    "open",
    "open_async",
    "open_file",
    "package_info",
    "read_bitmap",
    "rebase",
    "remove_bitmap",
    "remove_password",
    "repair",
    "resize",
    "serve",
    "snapshots",
    "store_bitmap",
    "unmount",
    "verify",
    "write_diff",
    "write_sidecar",
]

#: Names that are loaded when they are first asked for: importing tapfs costs next to nothing.
_LAZY = {
    "ApplyReport": "tapfs.jobs.apply",
    "AsyncImage": "tapfs.api.async_image",
    "Bitmap": "tapfs.edit_protocols",
    "ChangedExtent": "tapfs.jobs.diff",
    "CheckReport": "tapfs.findings",
    "Committed": "tapfs.jobs.commit",
    "CompactReport": "tapfs.jobs.compact",
    "CopyOptions": "tapfs.jobs.copying",
    "DamagedPart": "tapfs.jobs.damaged_files",
    "DiffReport": "tapfs.jobs.diff",
    "Difference": "tapfs.jobs.compare",
    "DiskFile": "tapfs.disk.disk_file",
    "DiskInPackage": "tapfs.disk.package",
    "DiskServer": "tapfs.api.servers",
    "ErrorKind": "tapfs.errors",
    "FileSystemSpace": "tapfs.jobs.free_space",
    "Gate": "tapfs.host.gate",
    "Hashed": "tapfs.disk.sidecar",
    "Image": "tapfs.disk.image",
    "ImageError": "tapfs.errors",
    "ImageInfo": "tapfs.disk.description",
    "LayerPasswords": "tapfs.disk.password",
    "MappedExtent": "tapfs.disk.chain_map",
    "Measured": "tapfs.jobs.measure",
    "MountPoint": "tapfs.api.mounts",
    "PackageInfo": "tapfs.disk.package",
    "ReadBitmap": "tapfs.jobs.bitmaps",
    "Rebased": "tapfs.jobs.rebase",
    "SnapshotRecord": "tapfs.edit_protocols",
    "Verdict": "tapfs.jobs.verify",
    "Verification": "tapfs.jobs.verify",
    "add_bitmap": "tapfs.api.bitmaps",
    "add_password": "tapfs.api.passwords",
    "amend": "tapfs.api.jobs",
    "apply": "tapfs.api.differences",
    "apply_snapshot": "tapfs.api.snapshots",
    "bitmaps": "tapfs.api.bitmaps",
    "check": "tapfs.api.jobs",
    "clear_bitmap": "tapfs.api.bitmaps",
    "commit": "tapfs.api.chains",
    "compact": "tapfs.api.jobs",
    "compare": "tapfs.api.jobs",
    "convert": "tapfs.api.jobs",
    "create": "tapfs.api.jobs",
    "create_snapshot": "tapfs.api.snapshots",
    "damaged_files": "tapfs.api.verification",
    "delete_snapshot": "tapfs.api.snapshots",
    "diff": "tapfs.api.differences",
    "disable_bitmap": "tapfs.api.bitmaps",
    "enable_bitmap": "tapfs.api.bitmaps",
    "enter_sandbox": "tapfs.api.confining",
    "info": "tapfs.api.opening",
    "measure": "tapfs.api.sizes",
    "merge_bitmap": "tapfs.api.bitmaps",
    "mount": "tapfs.api.mounts",
    "open": "tapfs.api.opening",
    "open_async": "tapfs.api.async_image",
    "open_file": "tapfs.api.opening",
    "package_info": "tapfs.api.opening",
    "read_bitmap": "tapfs.api.bitmaps",
    "rebase": "tapfs.api.chains",
    "remove_bitmap": "tapfs.api.bitmaps",
    "remove_password": "tapfs.api.passwords",
    "repair": "tapfs.api.jobs",
    "resize": "tapfs.api.sizes",
    "serve": "tapfs.api.servers",
    "snapshots": "tapfs.api.snapshots",
    "store_bitmap": "tapfs.api.bitmaps",
    "unmount": "tapfs.api.mounts",
    "verify": "tapfs.api.verification",
    "write_diff": "tapfs.api.differences",
    "write_sidecar": "tapfs.api.verification",
}


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        from importlib.metadata import version

        value = version("tapfs")
    elif name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'tapfs' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names: not the modules, which are internal but for what docs/python.md and the driver guide name."""
    return __all__
