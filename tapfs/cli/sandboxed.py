"""The sandboxes of the commands: what each may do of its host, from the words that its user has said.

A command that opens an image is in the table. Those that serve (mount, serve) enter theirs themselves, when what they
listen on is open. docs/sandbox.md has the same for users.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

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

#: Words by which a command asks another process, and looks at no image.
_OF_DISKS_IN_USE = ("domain", "vdev", "ublk", "vhost_user", "served")


def add_sandbox_option(name: str, parser: argparse.ArgumentParser) -> None:
    """Add --no-sandbox to the parser of a command that has a sandbox."""
    if name in SANDBOXED:
        parser.add_argument(
            "--no-sandbox", action="store_true", help="look at the image with all rights of the user (docs/sandbox.md)"
        )


def enter_for(name: str, arguments: argparse.Namespace) -> None:
    """Enter the sandbox of a command, if it has one and was not told to do without."""
    if (needs := needs_of(name, arguments)) is not None:
        from tapfs.host.sandbox.confinement import enter

        enter(needs)


def needs_of(name: str, arguments: argparse.Namespace) -> Needs | None:
    """What a command needs; None: it is not in a sandbox."""
    if name not in SANDBOXED or arguments.no_sandbox or any(_words(arguments, _OF_DISKS_IN_USE)):
        return None
    from tapfs.host.sandbox import rules
    from tapfs.host.sandbox.confinement import Needs, folder_of, read_with
    from tapfs.host.sandbox.filter import Calls

    command = SANDBOXED[name]
    if name == "dd":
        arguments.image, arguments.target = _operand(arguments, "if"), _operand(arguments, "of")
    if name == "convert":
        arguments.target = arguments.names[-1] if arguments.names else None
    images = [text for text in _words(arguments, _IMAGES) if text != "-"]
    folders = list(_words(arguments, _FOLDERS))
    elsewhere = any(map(_is_elsewhere, (*images, *folders)))
    written = [*_paths(arguments, command.writes)]
    made = [folder_of(path) for path in _paths(arguments, command.makes) if not _is_device(path)]
    if kept := getattr(arguments, "remote_cache", None):
        made.append(os.path.realpath(kept))
    # What is written elsewhere is shown by a process that is started when it is opened, after the chains.
    shown = any(map(_is_elsewhere, _words(arguments, (*command.makes, *command.writes))))
    chains = 0 if shown else _chains(name, command, arguments)
    free = chains == 0 or written or _names_parents_freely(arguments)
    anything = rules.READING if free and not command.alone else 0
    if command.writes:
        anything |= rules.WRITE_FILE | rules.TRUNCATE
    return Needs(
        read=tuple(
            place
            for path in (*_paths(arguments, (*_IMAGES, *_KEYS)), *folders)
            for place in (read_with(path) if path not in folders else (path,))
        ),
        write=tuple(written),
        make=tuple(made),
        anything=anything,
        chains=chains,
        scratch=True,
        keeps_scratch=command.keeps_scratch,
        calls=Calls(network=elsewhere, programs=elsewhere, mounts=elsewhere and bool(command.writes or command.makes)),
        cache_bytes=getattr(arguments, "cache", None) or 0,
    )


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
