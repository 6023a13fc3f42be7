"""The sandbox of a process that serves a disk, and the folders in which a disk in use may open and make images.

A process enters while it has one thread, and before it opens the image. Where the files of the chain lie only their
headers say. So the chain is looked at first, without locks and without the engine; after that the process reads what
lies with those files and no more. What operators name later (swap, mirror, the base of a commit) must lie in the folder
of the image, or in one of those that TAPFS_SANDBOX_FOLDERS names.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk.password import split_key_file
from tapfs.errors import ImageError
from tapfs.host.location import locate
from tapfs.host.lock import Sharing
from tapfs.host.remote.starter import enter_beside
from tapfs.host.sandbox import confinement, rules
from tapfs.host.sandbox.capabilities import FILES_OF_OTHERS, SYS_NICE
from tapfs.host.sandbox.confinement import folder_of
from tapfs.host.sandbox.filter import Calls
from tapfs.records import replace
from tapfs.serving.io_flusher import become_io_flusher

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tapfs.disk.open_options import OpenOptions

#: Folders, with ":" between them, in which disks in use may open and make images besides.
FOLDERS_VARIABLE = "TAPFS_SANDBOX_FOLDERS"


class DiskNeeds(NamedTuple):
    """What the process of a disk needs besides its image.

    `makes`: folders in which it makes files. `writes`: files and devices. `key_files`: have passwords.
    `connects`: to Unix sockets.
    """

    makes: tuple[str, ...]
    writes: tuple[str, ...] = ()
    key_files: tuple[str, ...] = ()
    connects: bool = False


def enter_for_disk(image: str | None, options: OpenOptions, needs: DiskNeeds) -> None:
    """Enter the sandbox of a process that will serve `image`, opened by `options`. Be the only thread.

    `image` None: nobody knows it, and none will be opened. One that lies elsewhere is fetched by a process that another
    one outside starts. One that is written elsewhere is shown by such a process as a file.
    Raises ImageError if the host lacks descriptors.
    """
    location = None if image is None else locate(image)
    elsewhere = location is not None and location.address is not None
    if confinement.is_switched_off():
        return
    become_io_flusher()  # it takes a capability
    path = () if location is None or elsewhere else (location.host_path,)
    roots = tuple(root for root in options.gate.roots or () if locate(root).address is not None)
    fetched = (*((location.name,) if location is not None and elsewhere else ()), *roots)
    keys = (split_key_file(name)[1] for name in needs.key_files)
    folders = folders_of_disks(filter(None, (image if options.writable else None,)))
    enter_beside(
        confinement.Needs(
            read=(*(place for each in path for place in confinement.read_with(each)), *keys),
            write=(*(path if options.writable else ()), *needs.writes),
            make=(*needs.makes, *folders),
            anything=rules.READING,
            chains=1,
            scratch=True,
            keeps_scratch=True,
            calls=Calls(listens=True, connects=needs.connects, rings=True),
            cache_bytes=None,  # its own limits follow
            capabilities=FILES_OF_OTHERS | {SYS_NICE},
        ),
        fetched,
        (location.name,) if location is not None and elsewhere and options.writable else (),
    )
    confinement.chain_is_open(() if image is None else _files_of_chain(image, options))


def folders_of_disks(images: Iterable[str]) -> tuple[str, ...]:
    """Folders in which disks in use make files: those of images that are written, and those that the user allows."""
    allowed = tuple(filter(None, os.environ.get(FOLDERS_VARIABLE, "").split(":")))
    return (*allowed, *(folder for image in images for folder in _below(image)))


def _below(image: str) -> tuple[str, ...]:
    """The folder of the image, for the overlay of a snapshot, and that of a link to it; a device has none."""
    with suppress(ImageError):
        location = locate(image)
        if location.address is None:
            folders = {folder_of(location.host_path), os.path.dirname(os.path.abspath(location.host_path))}
            return tuple(
                folder for folder in folders if folder != "/" and (location.in_memory or not folder.startswith("/dev"))
            )
    return ()


def _files_of_chain(image: str, options: OpenOptions) -> list[tuple[str, bool]]:
    """Where the files of a chain lie, as their headers say now; none where it cannot be opened: who serves says why."""
    from tapfs.disk.chain import open_layers

    looked = replace(options, writable=False, sharing=Sharing.UNCHECKED, direct=False)
    found: list[tuple[str, bool]] = []
    try:
        for layer in open_layers(image, looked):
            found += [(file.real_path(), False) for file in layer.files]
            layer.close()
    except ImageError:
        return []
    return found
