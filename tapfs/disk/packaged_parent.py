"""The parent of an image that is a disk of a package: an overlay over such a disk names it PACKAGE/MEMBER.

No file has that name. So it is looked for only where there is no file, and the gate judges the package's file as any
other that an image names.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from tapfs.disk.packed import contents_of
from tapfs.errors import ImageError
from tapfs.host.copied import Shared
from tapfs.packages.signs import HEAD_BYTES, may_be_package
from tapfs.records import replace

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer
    from tapfs.disk.open_options import OpenOptions
    from tapfs.host.file import LocalFile
    from tapfs.host.location import Location


def packaged_parent(location: Location, options: OpenOptions) -> Layer | None:
    """The disk of a package that an image names as its parent; None: nothing on the path is such a package.

    Raises ImageError for what is wrong with that package, or with its disk.
    """
    found = _package_file(location, options)
    if found is None:
        return None
    file, member = found
    from tapfs.disk.package import OpenPackage, package_in

    with ExitStack() as on_error:
        on_error.callback(file.close)
        package = package_in(file) if may_be_package(file.read(0, HEAD_BYTES)) else None
        disk = None if package is None else next((each for each in package.disks if each.name == member), None)
        if package is None or disk is None:
            return None
        on_error.pop_all()
    with closing(OpenPackage(Shared(file), package)) as opened:
        format_name = None if disk.chunks is not None else options.format
        return opened.layer(replace(options, format=format_name, disk=disk.number))


def _package_file(location: Location, options: OpenOptions) -> tuple[LocalFile, str] | None:
    """The file on the path that is no folder, and the rest of the path."""
    if location.address is not None or location.in_memory:
        return None
    path = location.host_path
    outer = path.rpartition("/")[0]
    while outer:
        place = replace(location, name=outer, host_path=outer)
        try:
            file = place.open(sharing=options.sharing, gate=options.gate)
        except ImageError:
            # It is not there, or a folder, or not to be looked at: the error about the whole path says more.
            outer = outer.rpartition("/")[0]
            continue
        return contents_of(file, None, writable=False), path[len(outer) + 1 :]
    return None
