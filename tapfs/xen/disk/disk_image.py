"""Open the image of a guest's disk by the disk's mode, and say in xenstore's words which image is open.

Mode r refuses only exclusive writers, w is an exclusive writer, w! lets in others with r or w! (tapfs/host/lock.py).
`tapfs/disk/live.py` changes the image while a guest uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.disk.chain import DEFAULT_CACHE_BYTES, OpenOptions
from tapfs.disk.live import SECTOR
from tapfs.disk.opening import complete_left, open_image
from tapfs.disk.password import given_password
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.lock import SHARING_OF_MODE, Sharing
from tapfs.records import replace
from tapfs.serving.log import log
from tapfs.xen.specification import DiskSpecification

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog
    from tapfs.xen.disk.settings import DiskSettings


def open_disk(settings: DiskSettings, plan_log: PlanLog) -> Image:
    """The image of a disk, first mended by the plan that a killed predecessor has left. Raises ImageError."""
    specification = settings.specification
    options = options_of(settings)
    options = replace(options, request_owner=plan_log.request_owner)
    try:
        if complete_left(specification.path, options, plan_log):
            log.info("completed what the last process had acknowledged")
        password = given_password(settings.key_files)
        image = open_image(specification.path, options, password=password, plan_log=plan_log)
    except ImageError as error:
        if error.kind is ErrorKind.LOCKED and (error.remedy or "").startswith("end that use"):
            error.remedy = "end that use first, or attach it with mode w! in every place (both must allow it)"
        if error.kind is ErrorKind.READ_ONLY and "{write_base}" in (error.neutral_remedy or ""):
            error.remedy = "attach the overlay, or say tapfs attach --write-base if nobody needs that any more"
        raise
    return _a_disk(image)


def look_at_disk(settings: DiskSettings) -> Image:
    """A view of the image, whoever else has it open for whatever: read-only, and without a lock. Raises ImageError.

    What is read of it is senseless while another writes, but its kind and size hold, and that it can be opened at all.
    """
    options = _options(settings, writable=False, sharing=Sharing.UNCHECKED)
    return _a_disk(open_image(settings.specification.path, options, password=given_password(settings.key_files)))


def options_of(settings: DiskSettings) -> OpenOptions:
    """How the image of the disk is opened."""
    return _options(settings, writable=settings.mode != "r", sharing=SHARING_OF_MODE[settings.mode])


def _options(settings: DiskSettings, *, writable: bool, sharing: Sharing) -> OpenOptions:
    specification = settings.specification
    return OpenOptions(
        format=specification.format,
        writable=writable,
        backing_formats=settings.backing_formats,
        direct=specification.direct,
        cache_bytes=DEFAULT_CACHE_BYTES if settings.cache_bytes is None else settings.cache_bytes,
        sharing=sharing,
        write_base=settings.write_base,
        say_raw=f"attach tap:aio:{specification.path}, or say -f raw,",
    )


def _a_disk(image: Image) -> Image:
    if image.size < SECTOR:
        image.close()
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, "is no disk: it has not one sector", path=image.path, op="open")
    return image


def swap_note(image: Image) -> str:
    """What xenstore is to hold of an image that is about to get the disk's name: which file it is, and those formats.

    The formats hold where the name leads to that file (`settings.read_settings`).
    """
    device, inode = image.layers[0].file.identity
    return f"{device}:{inode} {specification_of(image)[1]}"


def specification_of(image: Image) -> tuple[str, str]:
    """What xenstore is to hold of an image: the disk string, and the formats of its parents, nearest first.

    A guest can write what looks like another format into its disk, so no parent's format is left to a guess.
    """
    top, *below = image.layers
    string = DiskSpecification(top.path, top.driver.format_name).absolute().params
    return string, ",".join(layer.driver.format_name for layer in below)
