"""The sandboxes of the commands: what each may do of its host, from the words that its user has said.

A command that opens an image is in the table. Those that serve (mount, serve) enter theirs themselves, when what they
listen on is open. docs/sandbox.md has the same for users.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tapfs.records import NamedTuple

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from tapfs.host.sandbox.confinement import Needs


class _Sandboxed(NamedTuple):
    """A command: the options that name what it makes and writes.

    `chains`: so many are opened before the work begins, 0: nobody knows. `keeps_scratch`: scratch space is needed to
    the end. `alone`: no parent is opened.
    """

    makes: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    chains: int = 0
    keeps_scratch: bool = False
    alone: bool = False


#: The commands that look at images here. Of a chain that is written only its files are writable once it is open.
SANDBOXED: dict[str, _Sandboxed] = {
    "info": _Sandboxed(chains=1),
    "map": _Sandboxed(makes=("html",), chains=1),
    "report": _Sandboxed(makes=("html",), keeps_scratch=True),
    "check": _Sandboxed(keeps_scratch=True, alone=True),
    "compare": _Sandboxed(chains=2),
    "diff": _Sandboxed(makes=("stream",), chains=2),
    "changes": _Sandboxed(chains=1),
    "create": _Sandboxed(makes=("image",)),
    "convert": _Sandboxed(makes=("target",), writes=("target",), keeps_scratch=True),
    "dd": _Sandboxed(makes=("target",), writes=("target",)),
    "measure": _Sandboxed(keeps_scratch=True),
    "apply": _Sandboxed(makes=("target",), writes=("image",), keeps_scratch=True),
    "commit": _Sandboxed(writes=("image", "base")),
    "rebase": _Sandboxed(writes=("image",)),
    "compact": _Sandboxed(makes=("image",), writes=("image",), keeps_scratch=True),
    "repair": _Sandboxed(writes=("image",), keeps_scratch=True),
    "resize": _Sandboxed(writes=("first",)),
    "amend": _Sandboxed(writes=("image",)),
    "snapshot": _Sandboxed(writes=("image",)),
    "bitmap": _Sandboxed(writes=("image",)),
    "hash": _Sandboxed(makes=("image", "sidecar"), chains=1),
    "verify": _Sandboxed(chains=1),
    "salvage": _Sandboxed(makes=("target", "unplaced"), writes=("target",), chains=1, keeps_scratch=True),
}

#: Options that name images, and of `convert` and `measure` all words.
_IMAGES = (
    *(
        "image",
        "images",
        "first",
        "second",
        "more",
        "names",
        "sources",
        "backing",
        "second_backing",
        "target_backing",
        "base",
    ),
    *("new_backing", "source_file", "stream", "target"),
)
#: Options that name folders, in which a parent may lie.
_FOLDERS = ("backing_root", "parent_folder")
#: Options that name files with a password.
_KEYS = ("key_file", "target_key_file", "new_key_file", "old_key_file")

#: Words by which a command asks another process, and looks at no image. So does --batch.
_OF_DISKS_IN_USE = ("domain", "vdev", "ublk", "vhost_user", "served")

#: Commands that serve images, and enter their sandboxes themselves.
SERVERS = ("mount", "serve")

#: Commands without a sandbox of their own, and what takes its place. A new command is in one of the three tables.
EXEMPT: dict[str, str] = {
    "survey": "its worker processes look at the images, each in a sandbox (`tapfs.many.survey_task`)",
    "formats": "looks at no image",
    "list": "looks at no image: it asks the processes that serve, and reads their records",
    "umount": "looks at no image: the process that serves closes it",
    "provide": "looks at no image: surveys and mounts that it starts do, each in a sandbox",
    "scrub": "looks at no image: the processes that serve read their own",
    "remove": "unlinks a RAM disk, whatever is in it",
    "attach": "looks at no image: the disk process that is started does",
    "detach": "looks at no image: it asks the disk process",
    "stats": "looks at no image: it asks the processes that serve",
    "pause": "looks at no image: it asks the process that serves",
    "resume": "looks at no image: it asks the process that serves",
    "swap": "looks at no image: it asks the process that serves",
    "mirror": "looks at no image: it asks the disk process",
    "limit": "looks at no image: it asks the process that serves",
    "blktapctrl": "looks at no image: it starts the disk processes",
}

#: Options that name files beside an image.
_BESIDE = ("overlay", "sidecar")


def add_sandbox_option(name: str, parser: argparse.ArgumentParser) -> None:
    """Add --no-sandbox to the parser of a command that has a sandbox."""
    if name in (*SANDBOXED, *SERVERS):
        parser.add_argument(
            "--no-sandbox", action="store_true", help="look at the image with all rights of the user (docs/sandbox.md)"
        )


def enter_for(name: str, arguments: argparse.Namespace) -> None:
    """Enter the sandbox of a command, if it has one and was not told to do without."""
    if (needs := needs_of(name, arguments)) is not None:
        _enter(needs)


def _enter(needs: Needs) -> None:
    if needs.fetched or needs.shown:
        from tapfs.host.remote.starter import enter_beside

        enter_beside(needs, needs.fetched, needs.shown)
    else:
        from tapfs.host.sandbox.confinement import enter

        enter(needs)


def needs_of(name: str, arguments: argparse.Namespace) -> Needs | None:
    """What a command needs; None: it is not in a sandbox."""
    if name not in SANDBOXED or arguments.no_sandbox or any(_words(arguments, (*_OF_DISKS_IN_USE, "batch"))):
        return None
    command = SANDBOXED["repair" if name == "check" and arguments.repair else name]
    if name == "dd":
        arguments.image, arguments.target = _operand(arguments, "if"), _operand(arguments, "of")
    if name == "convert":
        arguments.target = arguments.names[-1] if arguments.names else None
    from tapfs.host.sandbox import rules

    needs = _reading(arguments)
    written = tuple(_paths(arguments, command.writes))
    made = tuple(_folders_of(_paths(arguments, command.makes)))
    chains = _chains(name, command, arguments)
    anything = rules.READING if chains == 0 or written else needs.anything
    if command.alone:
        anything = 0
    if command.writes:
        anything |= rules.WRITE_FILE | rules.TRUNCATE
    return needs._replace(
        write=written,
        make=(*needs.make, *made),
        anything=anything,
        chains=chains,
        keeps_scratch=command.keeps_scratch,
        shown=tuple(filter(_is_elsewhere, _words(arguments, (*command.makes, *command.writes)))),
    )


def enter_server(
    arguments: argparse.Namespace,
    *,
    makes: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
    removes: tuple[str, ...] = (),
) -> None:
    """Enter the sandbox of a process that serves the images of the words, when it has opened what it listens on.

    It needs besides what a command needs: folders in which it `makes` and `removes` files, files that it `writes`,
    io_uring, and Unix sockets that others connect to. It is still to be forked (`confinement.end_start`).
    """
    from tapfs.host.sandbox import rules
    from tapfs.host.sandbox.filter import Calls
    from tapfs.serving.io_flusher import become_io_flusher
    from tapfs.serving.log import open_syslog

    if arguments.no_sandbox or not arguments.owned:
        return
    open_syslog()
    become_io_flusher()  # it takes a capability
    needs = _reading(arguments)
    images = ("image", "more") if arguments.rw and not arguments.temp else ()
    written = tuple(_paths(arguments, images))
    shown = tuple(filter(_is_elsewhere, _words(arguments, images)))
    anything = needs.anything
    if written or shown or arguments.overlay is not None:
        # A writer looks at the overlays that lie over its image.
        anything |= rules.READING | rules.WRITE_FILE | rules.TRUNCATE
    _enter(
        needs._replace(
            write=writes,
            make=(*needs.make, *makes),
            opening_makes=tuple(_folders_of(_paths(arguments, ("overlay",)))),
            remove=removes,
            anything=anything,
            chains=1 + len(getattr(arguments, "more", ())),
            keeps_scratch=arguments.temp,
            calls=Calls(forks=True, listens=True, rings=True),
            shown=shown,
        )
    )


def _reading(arguments: argparse.Namespace) -> Needs:
    """What is read for the words of a command."""
    from tapfs.host.sandbox import rules
    from tapfs.host.sandbox.confinement import Needs, read_with

    images = [text for text in _words(arguments, (*_IMAGES, *_BESIDE)) if text != "-"]
    folders = tuple(_words(arguments, _FOLDERS))
    kept: str | None = getattr(arguments, "remote_cache", None)
    named = (place for path in _paths(arguments, (*_IMAGES, *_BESIDE)) for place in read_with(path))
    return Needs(
        read=(*named, *_paths(arguments, _KEYS), *folders),
        make=() if kept is None else (os.path.realpath(kept),),
        anything=rules.READING if _names_parents_freely(arguments) else 0,
        scratch=True,
        fetched=tuple(filter(_is_elsewhere, (*images, *folders))),
        cache_bytes=getattr(arguments, "cache", None) or 0,
    )


def _folders_of(paths: Iterator[str]) -> Iterator[str]:
    """The folders in which files of these names are made; a device is written where it is."""
    from tapfs.host.sandbox.confinement import folder_of

    return (folder_of(path) for path in paths if not _is_device(path))


def _chains(name: str, command: _Sandboxed, arguments: argparse.Namespace) -> int:
    """How many chains are opened before the command does its work; 0: nobody can say."""
    if name == "convert" and not (arguments.no_create or arguments.target_backing):
        return max(0, len(arguments.names) - 1)
    if name == "measure" and not arguments.target_backing:
        return len(arguments.sources)
    if name == "dd":
        return 1
    return command.chains


def _names_parents_freely(arguments: argparse.Namespace) -> bool:
    """Whether parents may lie anywhere."""
    return not getattr(arguments, "no_backing", False) and getattr(arguments, "backing_root", None) is None


def _words(arguments: argparse.Namespace, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        value: object = getattr(arguments, name, None)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (text for text in value if isinstance(text, str))  # pyright: ignore[reportUnknownVariableType]


def _paths(arguments: argparse.Namespace, names: tuple[str, ...]) -> Iterator[str]:
    """The files of this host that the options mean."""
    from tapfs.errors import ImageError
    from tapfs.host.location import locate

    for name in names:
        for text in _words(arguments, (name,)):
            if name in _KEYS:
                yield text
                yield text.partition("=")[2] or text
                continue
            try:
                location = locate(text)
            except ImageError:
                continue
            if location.address is None:
                yield location.host_path


def _is_elsewhere(text: str) -> bool:
    from tapfs.host.remote.address import Address

    return Address.parse(text) is not None


def _is_device(path: str) -> bool:
    folder = os.path.dirname(os.path.realpath(path))
    return folder.startswith("/dev") and not folder.startswith("/dev/shm")  # noqa: S108


def _operand(arguments: argparse.Namespace, word: str) -> str | None:
    found = [text.partition("=")[2] for text in arguments.operands if text.startswith(f"{word}=")]
    return found[-1] if found else None
