"""The base of a served overlay, open for writing below it: what the overlay holds can go into its base meanwhile.

Two Images have the base then. One, `base`, is the base's own chain and writes it. The other, `served`, is the overlay
over the base, and a guest uses it. Both have one driver for the base: a second driver would have older tables, and the
first may have given a place that those name to something else. `EngineChain` says how the two stay in step.

The base may only be written where the overlay hides it. What reads through the overlay to the base then stays the same
at every moment, and after every end of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk.bases import refuse_written_base
from tapfs.disk.chain import Layer, OpenOptions, files_below, open_layers
from tapfs.disk.image import Image
from tapfs.disk.live import on_the_same_files, once_more
from tapfs.driver import Snapshotted
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.files import LocalFiles, all_identities
from tapfs.host.lock import only_read_from_now_on, refuse_writers
from tapfs.host_files import Role

if TYPE_CHECKING:
    from tapfs.disk.plan_log import PlanLog


class WithBase(NamedTuple):
    """The two Images. `served` is to be closed before `base`."""

    served: Image
    base: Image

    def abandon(self) -> None:
        """Let go of both without a flush."""
        self.served.abandon()
        self.base.abandon()


def with_writable_base(
    image: Image, begin: Callable[[Image, Layer], None], *, password: bytes | None, plan_log: PlanLog | None
) -> WithBase:
    """The Images for a served overlay, which is flushed, and which nobody uses until `served` takes its place.

    `begin` is called with the base and the overlay before the overlay is opened anew: it has the base say that it is
    written. The old Image must stay of use after what it does to the overlay.
    The old Image stays as it is; it is to be abandoned if the new one serves. Raises ImageError: unsupported, locked
    (another uses the base), read_only (other overlays lie over it, or its format is only read), out_of_bounds.
    """
    _require_fit(image)
    with _letting_us_write(image.layers[1]), ExitStack() as on_error:
        base = _opened_base(image, password)
        on_error.callback(base.abandon)
        on_error.callback(_ended, base)
        begin(base, image.layers[0])
        layers = [once_more(image.layers[0], writable=True, direct=image.layers[0].file.direct)]
        on_error.callback(layers[0].close)
        shared = base.layers[0]
        layers.append(shared._replace(files=_same_numbers(shared)))
        on_error.callback(layers[1].close)
        for layer in image.layers[2:]:
            layers.append(once_more(layer, writable=False, direct=layer.file.direct))
            on_error.callback(layers[-1].close)
        served = Image(
            layers,
            writable=True,
            password=password,
            cache_bytes=image.cache_bytes,
            plan_log=plan_log,
            below=base,
        )
        on_error.callback(served.abandon)
        for each in (served, base):
            _ = each.engine_disk  # what cannot be served is to be known now
        on_error.pop_all()
    return WithBase(served, base)


def without_writable_base(images: WithBase, *, password: bytes | None, plan_log: PlanLog | None) -> Image:
    """The overlay over its base as it was before, both flushed and at rest: the base is only read again."""
    return _reopened(images.served.layers, images.served, password, plan_log)


def base_alone(images: WithBase, name: str, *, password: bytes | None, plan_log: PlanLog | None) -> Image:
    """The base as the disk that is served from now on under `name`, both flushed and at rest."""
    return _reopened(images.base.layers, images.served, password, plan_log, name)


def _reopened(
    layers: Sequence[Layer], like: Image, password: bytes | None, plan_log: PlanLog | None, name: str | None = None
) -> Image:
    with ExitStack() as on_error:
        opened: list[Layer] = []
        for depth, layer in enumerate(layers):
            called = name if depth == 0 else None
            opened.append(once_more(layer, called, writable=depth == 0, direct=layer.file.direct))
            on_error.callback(opened[-1].close)
        image = Image(opened, writable=True, password=password, cache_bytes=like.cache_bytes, plan_log=plan_log)
        _ = image.engine_disk
        on_error.pop_all()
    for layer in image.layers[1:]:
        for file in layer.files:
            only_read_from_now_on(file.descriptor)
    return image


def _require_fit(image: Image) -> None:
    """Raise ImageError for an overlay that cannot go into its base while it is used."""
    top = image.layers[0]
    if not image.writable:
        raise ImageError(ErrorKind.READ_ONLY, "was opened read-only", path=image.path, op="commit")
    if len(image.layers) == 1:
        raise ImageError(ErrorKind.UNSUPPORTED, "has no backing file to commit to", path=image.path, op="commit")
    base = image.layers[1]
    size, found = image.size, base.driver.geometry.virtual_size
    if size != found:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS,
            f"the base has {found} bytes and the overlay {size}: this cannot change while the disk is used",
            path=base.path,
            op="commit",
            remedy="commit it when nobody uses it: tapfs commit FILE",
        )
    if isinstance(top.driver, Snapshotted) and top.driver.snapshots():
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "has snapshots, which show the base, too: they would not stay what they are",
            path=top.path,
            op="commit",
            remedy="delete them first",
        )


def _ended(base: Image) -> None:
    """The base is not written any more, as far as that can be said after an error."""
    with suppress(ImageError):
        base.end_writing()


def _same_numbers(layer: Layer) -> LocalFiles:
    """The files of a layer on descriptors of their own, with the numbers that its driver knows them by."""
    files = on_the_same_files(layer, writable=False, direct=layer.file.direct)
    for name, number in sorted(layer.files.names.items(), key=itemgetter(1)):
        if number == len(files):
            files.open(name, Role.READ_ONLY_DATA)
    return files


def _opened_base(image: Image, password: bytes | None) -> Image:
    """The chain from the base on, open for writing, the base locked against everybody else."""
    base, *below = image.layers[1:]
    options = OpenOptions(
        format=base.driver.format_name,
        writable=True,
        write_base=True,  # of the overlays over it those that are not ours are refused below
        backing_formats=[layer.driver.format_name for layer in below],
    )
    with ExitStack() as on_error:
        layers = open_layers(base.path, options)
        for layer in layers:
            on_error.callback(layer.close)
        if [layer.files.identities for layer in layers] != [layer.files.identities for layer in image.layers[1:]]:
            raise ImageError(
                ErrorKind.LOCKED, "is another file than the one that is served", path=base.path, op="commit"
            )
        ours = all_identities([layer.files for layer in image.layers])
        refuse_written_base(layers[0].file, lambda overlay: files_below(overlay, OpenOptions()), own=ours)
        direct: list[Layer] = []
        for depth, (layer, old) in enumerate(zip(layers, image.layers[1:], strict=True)):
            for file in layer.files:
                file.request_owner = old.file.request_owner
            direct.append(once_more(layer, writable=depth == 0, direct=old.file.direct))
            on_error.callback(direct[-1].close)
        opened = Image(direct, writable=True, password=password, cache_bytes=image.cache_bytes)
        on_error.pop_all()
    for layer in layers:
        layer.close()  # the locks belong to the open files, which `opened` has, too
    return opened


@contextmanager
def _letting_us_write(base: Layer) -> Generator[None]:
    """The readers' locks that this process has on the base do not refuse a writer meanwhile; nor if it fails then."""
    for file in base.files:
        refuse_writers(file.descriptor, refused=False)
    try:
        yield
    except BaseException:
        for file in base.files:
            refuse_writers(file.descriptor, refused=True)
        raise
