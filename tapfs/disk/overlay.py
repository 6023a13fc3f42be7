"""Scratch writes: a copy-on-write overlay over an image that is itself only read.

The overlay is an ordinary qcow image whose backing file is the image, so QEMU can read an overlay that was kept. The
image is opened as the user says, or its format is probed, because the user has named it. The parents of the image are
opened by the rules of `tapfs.disk.chain`. The parent that the overlay's header names is compared with the image that
the user has named, and never followed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import cast

from tapfs.disk.bases import note_parent
from tapfs.disk.chain import Layer, OpenOptions, is_encrypted, layer_of_file, open_layers
from tapfs.disk.password import password_missing
from tapfs.disk.probe import format_named
from tapfs.driver import BackingReference, CreatableFormat, CreateRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.file import LocalFile
from tapfs.host.files import all_identities
from tapfs.host.location import locate, locate_parent
from tapfs.host.new_file import UnnamedFile
from tapfs.host.scratch import unnamed_descriptor
from tapfs.host.target import Target
from tapfs.plan import Plan
from tapfs.records import replace

#: The format of scratch overlays.
SCRATCH_FORMAT = "qcow"

#: Bytes of a cluster. Guests write pages: smaller clusters only make more metadata, larger ones
#: copy what is not written. On a disk above `_SMALL_DISK` bytes the L1 table would become long.
_SMALL_CLUSTER, _LARGE_CLUSTER = 4096, 65536
_SMALL_DISK = 1 << 40


def open_overlaid(path: str, options: OpenOptions, *, unlocked: bool) -> list[Layer]:
    """The chain of image `path` with the overlay that `options` ask for on top, which alone is writable.

    A kept overlay is made if it is not there. Over an encrypted image the overlay is encrypted,
    too, by the same password; `unlocked` says that there is one.
    Raises ImageError, and then every file is closed: denied if the password is missing, exists
    if the overlay belongs to another image.
    """
    with contextlib.ExitStack() as on_error:
        layers = open_layers(path, replace(options, writable=False, overlay=None, temporary=False))
        for layer in layers:
            on_error.callback(layer.close)
        if is_encrypted(layers) and not unlocked:
            raise password_missing(path)
        if options.overlay is None:
            name = f"{locate(path).absolute().name} (temporary overlay)"
            made = options.scratch is not None
            file = temporary_again(name, options) if made else _temporary(name, _creation(layers), options)
            top = _checked(name, file, layers[0])
        else:
            top, _ = open_over(layers, options.overlay, direct=options.direct)
        on_error.pop_all()
    return [top, *layers]


def open_over(
    layers: Sequence[Layer], path: str, *, size: int | None = None, direct: bool = False
) -> tuple[Layer, bool]:
    """The writable overlay `path` over an open chain, and whether it was made: it is if it is not there.

    `size` in bytes is that of a new one, which is else as large as the chain's disk. The layers stay the caller's.
    Raises ImageError: exists if the overlay that is there belongs to another image.
    """
    location = locate(path)
    path = location.name
    if location.in_memory:
        raise ImageError(ErrorKind.UNSUPPORTED, "an overlay grows, which a RAM disk cannot", path=path, op="open")
    with Target(location) as target:
        if not target.is_there:
            try:
                top = _checked(path, _create(target, _creation(layers, size), direct=direct), layers[0])
            except FileExistsError:
                pass  # another process has made it meanwhile: it is taken up like any that is there, if it is free
            else:
                note_parent(layers[0].file, path)
                return top, True
    with Target(location) as target:
        if target.identity() in all_identities([layer.files for layer in layers]):
            raise ImageError(ErrorKind.EXISTS, "is the image itself or one of its parents, not an overlay", path=path)
        target.refuse_another_s()
        return _checked(path, target.open(direct=direct), layers[0]), False


def _checked(name: str, file: LocalFile, image: Layer) -> Layer:
    """The layer in an open overlay of `image`; the file is closed if it is another's."""
    top = layer_of_file(name, file, OpenOptions(format=SCRATCH_FORMAT, writable=True))
    try:
        _check_parent(top, image)
    except BaseException:
        top.close()
        raise
    return top


def _creation(layers: Sequence[Layer], size: int | None = None) -> Plan:
    parent = locate(layers[0].path).absolute().host_path
    return creation_plan(
        layers, SCRATCH_FORMAT, parent, layers[0].driver.geometry.virtual_size if size is None else size
    )


def creation_plan(layers: Sequence[Layer], format_name: str, parent: str, size: int) -> Plan:
    """The plan that makes an empty file an overlay of `size` bytes over an open chain, which it names `parent`."""
    image = layers[0]
    small_clusters = {"cluster_size": str(_SMALL_CLUSTER if size <= _SMALL_DISK else _LARGE_CLUSTER)}
    request = CreateRequest(
        virtual_size=size,
        backing=BackingReference(parent, image.driver.format_name),
        options=small_clusters if format_name == SCRATCH_FORMAT else {},
        encrypted=is_encrypted(layers),
        parent=image.driver,
    )
    return cast("CreatableFormat", format_named(format_name)).create(request)


def _create(target: Target, plan: Plan, *, direct: bool) -> LocalFile:
    """A new overlay that is there under its name, complete and durable, or not at all."""
    with UnnamedFile.replaceable(target, None) as unnamed:
        file = filled(unnamed.open(direct=direct), plan)
        try:
            unnamed.publish(overwrite=False)
        except BaseException:
            file.close()
            raise
        return file


def _temporary(name: str, plan: Plan, options: OpenOptions) -> LocalFile:
    """A new overlay without a name: it is gone with its last descriptor, so also after a crash."""
    descriptor = unnamed_descriptor("make a temporary overlay")
    return filled(_without_name(name, descriptor, options), plan)


def temporary_again(name: str, options: OpenOptions) -> LocalFile:
    """The overlay without a name that `options.scratch` is a descriptor of. Raises ImageError."""
    if options.scratch is None:
        raise AssertionError("no overlay was made before")
    return _without_name(name, os.dup(options.scratch), options)


def _without_name(name: str, descriptor: int, options: OpenOptions) -> LocalFile:
    return LocalFile(name, descriptor, writable=True, direct=options.direct, request_owner=options.request_owner)


def filled(file: LocalFile, plan: Plan) -> LocalFile:
    """The file after its creation plan; closed on an error."""
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # importing this module needs no engine

    try:
        execute_on_files([HostDescriptor(file.descriptor, file.path, writable=True)], plan)
    except BaseException:
        file.close()
        raise
    return file


def _check_parent(overlay: Layer, image: Layer) -> None:
    """See that the overlay was made over this image: over another its clusters would be nonsense."""
    reference = overlay.driver.geometry.backing
    if reference is None:
        raise ImageError(ErrorKind.EXISTS, "is an image without a backing file, not an overlay", path=overlay.path)
    if not _names(overlay.path, reference.name, image.file):
        raise ImageError(
            ErrorKind.EXISTS,
            f"is an overlay over {reference.name!r}, not over {image.path}",
            path=overlay.path,
            remedy="name another file for the overlay",
        )


def _names(overlay: str, parent: str, file: LocalFile) -> bool:
    """Whether `parent`, which an overlay names, is the open file: a file, or PACKAGE/MEMBER."""
    if file.member is not None:
        if not parent.endswith(f"/{file.member}"):
            return False
        parent = parent.removesuffix(f"/{file.member}")
    return locate_parent(overlay, parent).identity() == file.identity
