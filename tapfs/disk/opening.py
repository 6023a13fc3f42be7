"""Open images as the user asks: plainly, under an overlay, or on a file that is open already."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from tapfs.disk.chain import Layer, OpenOptions, open_layers, open_parents
from tapfs.disk.image import Image
from tapfs.disk.password import password_missing, require_bytes
from tapfs.host.file import LocalFile
from tapfs.host.location import Location, locate

if TYPE_CHECKING:
    from tapfs.disk.plan_log import KeptPlan, PlanLog

_Image = TypeVar("_Image", bound=Image)


def open_image(
    path: str,
    options: OpenOptions,
    *,
    password: bytes | None = None,
    metadata_only: bool = False,
    plan_log: PlanLog | None = None,
) -> Image:
    """Open a chain as an Image. `metadata_only`: an encrypted one needs no password yet. `plan_log`: as for Image.

    With an overlay the Image is writable, and the image at `path` is not touched.
    """
    require_bytes(password)
    if options.overlaid:
        from tapfs.disk.overlay import open_overlaid

        layers = open_overlaid(path, options, unlocked=password is not None)
    else:
        layers = open_layers(path, options)
    writable = options.writable or options.overlaid
    temporary = options.temporary and options.overlay is None
    image = Image(
        layers,
        writable=writable,
        password=password,
        cache_bytes=options.cache_bytes,
        plan_log=plan_log,
        temporary=temporary,
    )
    if image.needs_password and not metadata_only:
        image.close()
        raise password_missing(path)
    return image


def complete_left(path: str, options: OpenOptions, plan_log: PlanLog) -> bool:
    """Execute the plan that a killed process has left for an image; whether there was one. It is durable then.

    What that process had acknowledged needs it, so it comes before the image is opened. With `options.scratch` it is
    that file which was written. Raises ImageError.
    """
    left = False
    location = locate(path)
    if plan_log.exists and options.writable and (options.scratch is not None or not location.in_memory):
        kept = plan_log.kept()
        left = kept is not None and _complete(location, options, kept)
    plan_log.remove()
    return left


def _complete(location: Location, options: OpenOptions, kept: KeptPlan) -> bool:
    """Execute a kept plan, if the files at its paths are those that it was made for; whether they are."""
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # most images are opened without

    with ExitStack() as stack:
        files: list[LocalFile] = []
        for place in (location, *map(locate, kept.further_paths)):
            if options.scratch is not None and not files:
                from tapfs.disk.overlay import temporary_again

                file = temporary_again(place.name, options)
            else:
                file = place.open(
                    writable=True, sharing=options.sharing, direct=options.direct, request_owner=options.request_owner
                )
            stack.callback(file.close)
            files.append(file)
        same = kept.is_for([file.identity for file in files])
        if same:
            execute_on_files([HostDescriptor(file.descriptor, file.path, writable=True) for file in files], kept.plan)
    return same


def open_image_on(layer: Layer, options: OpenOptions, *, password: bytes | None) -> Image:
    """The Image of a top layer that is open already; its parents are opened here."""
    return open_kind_on(Image, layer, options, password=password)


def open_kind_on(kind: type[_Image], layer: Layer, options: OpenOptions, *, password: bytes | None) -> _Image:
    """The same as an Image of another kind."""
    layers = open_parents([layer], options)
    return kind(layers, writable=options.writable, password=password, cache_bytes=options.cache_bytes)
