"""The options with which a chain of images is opened."""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.disk.format_choice import SAY_RAW
from tapfs.host.gate import ORDINARY, Gate
from tapfs.host.lock import Sharing
from tapfs.host.remote.options import USUAL, RemoteOptions
from tapfs.records import dataclass
from tapfs.salvage import SalvageRequest

#: The bound of the engine's map cache, in bytes, whatever the size of the image.
DEFAULT_CACHE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to open a chain.

    `format`: of the image itself (probed if None). `disk`: its number in the package (`tapfs.disk.package`) that the
    name is one of, from 1 on; `format` is that disk's then. `snapshot`: a disk inside it instead of the current one.
    `backing`: the parent to use instead of the one that the image names. `backing_formats`: of the parents, nearest
    first.
    `any_parent`: a parent is taken even if it is not the one that the image was made over.
    `parent_folders`: where parents are looked for, too, that their children name by an identity and not by a file.
    `gate`: which files the images may name. `sharing`: who is let in beside us.
    `direct`: O_DIRECT for guest data, `request_owner`: the disk that those requests belong to (`LocalFile`).
    `writable_parents`: the parents, by their depth from 1 on, that are opened for writing, as `commit` has it.
    `write_base`: it is written even if overlays lie over it, which that spoils (`tapfs.disk.bases`).
    `created`: the image was made a moment ago and is empty (`OpenRequest.created`).
    `grown_size`: bytes that the image is about to have, if it is growing (`OpenRequest.grown_size`).
    `overlay`: a file for scratch writes (`tapfs.disk.overlay`), `temporary`: one without a name; with either the image
    itself is opened read-only, whatever `writable` says. `scratch`: a descriptor, which stays the caller's, of the file
    without a name that a process before has written; None: a new one is made. `say_raw`: how the user says that the
    image is raw, for remedies. `cache_bytes`: the bound of the engine's map cache, for all layers together.
    `remote`: how what lies elsewhere is read. `salvage`: the image's file is scanned for what its metadata has lost
    (`tapfs.disk.salvaging`), and the image is only read. `cut`: of data that the end of a file cuts what is there is
    read (`OpenRequest.cut`).
    """

    format: str | None = None
    writable: bool = False
    lenient: bool = False
    disk: int | None = None
    snapshot: str | None = None
    backing: str | None = None
    backing_formats: Sequence[str] = ()
    any_parent: bool = False
    parent_folders: Sequence[str] = ()
    gate: Gate = ORDINARY
    direct: bool = False
    request_owner: int | None = None
    writable_parents: frozenset[int] = frozenset()
    sharing: Sharing = Sharing.EXCLUSIVE
    overlay: str | None = None
    write_base: bool = False
    created: bool = False
    grown_size: int | None = None
    temporary: bool = False
    scratch: int | None = None
    say_raw: str = SAY_RAW
    cache_bytes: int = DEFAULT_CACHE_BYTES
    remote: RemoteOptions = USUAL
    salvage: SalvageRequest | None = None
    cut: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.cache_bytes < 1 << 63:
            raise ValueError(f"cache_bytes is {self.cache_bytes}, not a number of bytes")
        if isinstance(self.backing_formats, str):
            raise TypeError("backing_formats is a sequence of names, not one str")
        if isinstance(self.parent_folders, str):
            raise TypeError("parent_folders is a sequence of names, not one str")

    @property
    def overlaid(self) -> bool:
        """Whether writes go to an overlay."""
        return self.overlay is not None or self.temporary
