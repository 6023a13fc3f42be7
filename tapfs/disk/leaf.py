"""Put an overlay over a served image under the name of the image, and give the name back when the overlay goes.

A toolstack knows a disk by one name, and opens that name again when its guest reboots, is restored or has moved. So the
name has to be the newest of the chain, the leaf, at any moment. The image that was served gets the name of the
snapshot instead. In this order:

1. the overlay is made, complete and durable, under the name of the snapshot, and names that as its parent: itself;
2. nobody writes any more, and the image is flushed;
3. the image is noted to lie below the overlay, and the two names are exchanged, which is one step of the host, and made
   durable;
4. writes go to the overlay.

A crash before 3 leaves the image under its own name, and a file that is its own parent under the other; `_remove_left`
knows such files. A crash after 3 leaves the overlay, empty, over the image. Whoever opens the name is right either way.

The way back (`tapfs.jobs.live_commit`) is the same: once the base holds all of the disk, durably, and nobody writes,
the two names are exchanged. A crash after that leaves the overlay under the name of the snapshot, as its own parent.
"""

from __future__ import annotations

import contextlib
import os
import stat

from tapfs.disk.bases import note_parent
from tapfs.disk.chain import Layer, OpenOptions, is_encrypted, layer_of_file, open_layer
from tapfs.disk.image import Image
from tapfs.disk.live import Overlaid, size_of_overlay
from tapfs.disk.overlay import SCRATCH_FORMAT, creation_plan, filled
from tapfs.disk.probe import format_named
from tapfs.driver import Trait, has_trait
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.base_marks import take_over_format
from tapfs.host.exchange import exchange_names
from tapfs.host.file import LocalFile
from tapfs.host.location import Location, locate, locate_parent, stored_parent
from tapfs.host.lock import Sharing
from tapfs.host.new_file import UnnamedFile
from tapfs.host.target import Target

#: The format of an overlay, but over an encrypted image. It says of what format its parent is, so no opener guesses
#: from what a guest wrote.
_FORMAT = "qcow2"


def overlay_for_name(image: Image, snapshot: str, size: int | None, *, told: str | None) -> Overlaid:
    """An overlay that waits under the name `snapshot` to be exchanged with the served image (`exchange`).

    It is `size` bytes large, or as large as the disk. `told` is the format that the toolstack says of the name: where
    the overlay has another one, that is noted on it (`tapfs.host.base_marks`). Raises ImageError: unsupported where the
    name cannot pass to another file, exists, locked, out_of_bounds.
    """
    top = image.layers[0]
    _require_exchangeable(top, snapshot)
    size = size_of_overlay(image, snapshot, size)
    name = SCRATCH_FORMAT if is_encrypted(image.layers) else _FORMAT
    location = locate(snapshot).absolute()
    _remove_left(location)
    with Target(location) as target:
        if target.is_there:
            raise ImageError(ErrorKind.EXISTS, "is there already", path=snapshot, op="swap", remedy="name a new file")
        plan = creation_plan(image.layers, name, _named_by(top, location), size)
        with UnnamedFile.replaceable(target, None) as unnamed:
            file = filled(unnamed.open(direct=top.file.direct), plan)
            try:
                if told not in (None, name):
                    take_over_format(file.descriptor, name, snapshot)
                unnamed.publish(overwrite=False)
                _take_after(file, top.file)
            except BaseException:
                file.close()
                raise
    return Overlaid(
        layer_of_file(location.name, file, OpenOptions(format=name, writable=True, created=True)), made=True
    )


def exchange(image: Image, overlaid: Overlaid) -> None:
    """Exchange the names of a served image, which is flushed and at rest, and of its overlay; durable.

    Raises ImageError, and then each has its own name still.
    """
    base, overlay = image.layers[0].file, overlaid.layer.file
    name = base.real_path()
    # First, so that no crash leaves a base that anybody may write. While the name is the base's own this says nothing.
    note_parent(base, name)
    exchange_names(name, overlay.real_path())


def require_name_passes_down(image: Image, *, told: str | None) -> None:
    """See that the name of a served overlay can pass to its base (`pass_name_down`).

    `told` is the format that the toolstack says of the name. Raises ImageError(unsupported).
    """
    top, base = image.layers[:2]
    for layer in (top, base):
        if locate(layer.path).in_memory or not stat.S_ISREG(os.fstat(layer.file.descriptor).st_mode):
            raise _cannot_pass_down(base, f"{layer.path} is no file whose name could pass to another")
    if top.file.identity[0] != base.file.identity[0]:
        raise _cannot_pass_down(base, "lies on another file system than its overlay")
    if os.path.dirname(top.file.real_path()) != os.path.dirname(base.file.real_path()):
        if len(base.files) > 1:
            raise _cannot_pass_down(base, "consists of several files, which have to stay in one folder")
        if _named_from_its_folder(base):
            raise _cannot_pass_down(base, "names its own backing file from the folder that it is in")
    if told is None:
        _require_found_by_contents(base, base.driver.format_name, op="commit")


def pass_name_down(image: Image, base: LocalFile, base_format: str, *, told: str | None) -> None:
    """Give the name of a served overlay to its base, which holds all of the disk, durably; the overlay's name goes.

    Everything is flushed and at rest. It is durable when this returns. Raises ImageError, and then each has its own
    name still.
    """
    overlay = image.layers[0].file
    if told not in (None, base_format):
        take_over_format(base.descriptor, base_format, base.path)
    name, snapshot = overlay.real_path(), base.real_path()
    exchange_names(name, snapshot)
    with contextlib.suppress(OSError):  # what is left is an image that is its own parent
        status = os.lstat(snapshot)
        if (status.st_dev, status.st_ino) == overlay.identity:
            os.unlink(snapshot)


def require_name_can_point(image: Image, file: str, format_name: str, *, told: str | None) -> None:
    """See that the name of a served image can become a link to `file` (`point_name_at`). Raises ImageError."""
    top = image.layers[0]
    if locate(top.path).in_memory or not stat.S_ISREG(os.fstat(top.file.descriptor).st_mode):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "is no file whose name could become a link",
            path=top.path,
            op="mirror",
            remedy="say {keep_names}, and have the toolstack name the copy before the guest starts again",
        )
    if told is None:
        _require_found_by_contents(top, format_name, op="mirror")
    kept = _mirrored(top.file)
    if os.path.lexists(kept) and not os.path.islink(kept):
        raise ImageError(
            ErrorKind.EXISTS,
            "is there already, and the old image is to get that name",
            path=kept,
            op="mirror",
            remedy="give it another name, or remove it",
        )
    if os.path.realpath(file) in (os.path.realpath(kept), top.file.real_path()):
        raise ImageError(ErrorKind.EXISTS, "is a name of the old image", path=file, op="mirror", remedy="name another")


def point_name_at(image: Image, copy: Image, file: str, *, told: str | None) -> None:
    """Have the name of a served image lead to `copy`, which is in `file`; the image's name ends in `.mirrored` then.

    Both are at rest, durable, and the same. It is durable when this returns. Raises ImageError, and then the name still
    leads to the image. A crash leaves it so, with a link beside it that is good for nothing, or it is done.
    """
    old = image.layers[0].file
    if told not in (None, copy.format_name):
        take_over_format(copy.layers[0].file.descriptor, copy.format_name, file)
    name, link = old.real_path(), _mirrored(old)
    try:
        if os.path.islink(link):
            os.unlink(link)
        os.symlink(os.path.abspath(file), link)
    except OSError as error:
        raise from_os_error(error, path=link, op="make a link to the copy") from error
    try:
        exchange_names(name, link)
    except BaseException:
        os.unlink(link)
        raise


def _mirrored(file: LocalFile) -> str:
    return f"{file.real_path()}.mirrored"


def _cannot_pass_down(base: Layer, why: str) -> ImageError:
    return ImageError(
        ErrorKind.UNSUPPORTED,
        why,
        path=base.path,
        op="commit",
        remedy="say {keep_names}: each keeps its name, and the overlay stays, empty",
    )


def _require_found_by_contents(layer: Layer, format_name: str, *, op: str) -> None:
    """Raise ImageError(unsupported) for a format that must be named, where nobody names one."""
    if has_trait(format_named(format_name), Trait.NAMED_TO_WRITE):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"nobody says the format of the disk by its name, which would be {format_name} from then on",
            path=layer.path,
            op=op,
            remedy=f"have the configuration of the guest say it (tap:{format_name}:), or say {{keep_names}}",
        )


def _named_from_its_folder(layer: Layer) -> bool:
    """Whether a parent is named by a path that begins at the folder of its child."""
    reference = layer.driver.geometry.backing
    return reference is not None and not os.path.isabs(reference.name)


def _require_exchangeable(top: Layer, snapshot: str) -> None:
    if locate(top.path).in_memory or not stat.S_ISREG(os.fstat(top.file.descriptor).st_mode):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "is no file whose name could pass to an overlay",
            path=top.path,
            op="swap",
            remedy="say {keep_names}, and have the toolstack name the overlay before the guest starts again",
        )
    if len(top.files) > 1 and os.path.dirname(os.path.abspath(snapshot)) != os.path.dirname(top.file.real_path()):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "consists of several files, which have to stay in one folder",
            path=top.path,
            op="swap",
            remedy="name a snapshot in that folder",
        )
    if _named_from_its_folder(top) and os.path.dirname(os.path.abspath(snapshot)) != os.path.dirname(
        top.file.real_path()
    ):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "names its backing file from the folder that it is in, so it has to stay there",
            path=top.path,
            op="swap",
            remedy="name a snapshot in that folder",
        )


def _named_by(top: Layer, snapshot: Location) -> str:
    """How the overlay names its parent: without a folder where both are in one, so that the folder can be moved."""
    here = os.path.abspath(top.path)
    if os.path.realpath(here) == here and os.path.dirname(here) == os.path.dirname(snapshot.host_path):
        return stored_parent(os.path.basename(snapshot.host_path))
    return snapshot.host_path


def _take_after(file: LocalFile, image: LocalFile) -> None:
    """Have the overlay belong to whom the image belongs, with the same rights: it will have the image's name."""
    status = os.fstat(image.descriptor)
    try:
        os.fchown(file.descriptor, status.st_uid, status.st_gid)
        os.fchmod(file.descriptor, stat.S_IMODE(status.st_mode))
    except OSError as error:
        raise from_os_error(error, path=file.path, op="give the overlay the image's owner") from error


def _remove_left(location: Location) -> None:
    """Remove what a swap that was cut off has left under the name: an image that is its own parent."""
    with contextlib.suppress(ImageError, OSError):
        options = OpenOptions(lenient=True, sharing=Sharing.EXCLUSIVE)
        with contextlib.closing(open_layer(location.name, options)) as layer:
            reference = layer.driver.geometry.backing
            if reference is None or locate_parent(layer.path, reference.name).identity() != layer.file.identity:
                return
            layer.file.unlink()
