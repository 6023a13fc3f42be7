"""The options that say how an image is opened, and the one way in which every command opens it."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from tapfs.cli.parser import format_argument, size_argument
from tapfs.disk.password import PASSWORD_VARIABLE, given_password, nonempty
from tapfs.errors import ErrorKind, ImageError, printable
from tapfs.records import replace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tapfs.disk.chain import OpenOptions
    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog
    from tapfs.driver import Driver
    from tapfs.host.remote.options import RemoteOptions

#: The help of a word that names an image.
IMAGE_HELP = "a file, a block device, ram:NAME or an address such as https://HOST/FILE"

#: So much of the start of a disk tells whether it was ever written.
_NOISE_BYTES = 64 << 10

#: The sizes that sectors of a disk have.
SECTOR_SIZES = (512, 1024, 2048, 4096)

_Result = TypeVar("_Result")

if TYPE_CHECKING:
    #: How an option is added to a group of options.
    _Add = Callable[..., argparse.Action]


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`open_image` reads. The positional that names the image is the caller's, as `image`."""
    group = parser.add_argument_group("how to open the image")
    _add_format(group.add_argument)
    group.add_argument(
        "--disk",
        metavar="N",
        type=disk_number,
        help="the disk with this number in a package (.ova, .ovf, .vmx, .vbox, .xva, .box), as 'tapfs info' lists them",
    )
    group.add_argument("--backing", metavar="FILE", help="use FILE as the parent instead of the one the image names")
    _add_parents(group.add_argument)
    group.add_argument(
        "--snapshot", metavar="NAME", help="the disk of that name or id which the image keeps beside its current one"
    )
    _add_access(group.add_argument)
    group.add_argument(
        "-U", "--force-share", action="store_true", help="look even while another process writes the image"
    )


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`add_image_options` does, and qemu-img's letter of --snapshot, for commands that copy a disk."""
    add_image_options(parser)
    parser.add_argument(
        "-l",
        "--source-snapshot",
        dest="snapshot",
        metavar="SNAPSHOT",
        default=argparse.SUPPRESS,
        help="as --snapshot; in either snapshot.id=ID and snapshot.name=NAME say which of the two is meant",
    )


def add_changed_image_options(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`open_options` reads, for commands that change an image and need it alone, as it is."""
    group = parser.add_argument_group("how to open the image")
    _add_format(group.add_argument)
    _add_parents(group.add_argument)
    _add_access(group.add_argument)
    parser.set_defaults(disk=None, backing=None, snapshot=None, force_share=False)


def _add_format(add: _Add) -> None:
    add(
        "-f",
        "--format",
        metavar="FMT",
        type=format_argument,
        help="format of the image; without it the contents decide (never writable raw)",
    )


def disk_number(text: str) -> int:
    """The number of a disk in a package, from 1 on."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:9]) == int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of a disk; they count from 1")
    return int(text)


def _add_parents(add: _Add) -> None:
    add(
        "--backing-format",
        metavar="FMT",
        type=format_argument,
        action="append",
        default=[],
        help="format of the parent; given again, that of the parent's parent, and so on",
    )
    add(
        "--any-parent",
        action="store_true",
        help="take the parent even if it is not the one that the image was made over (its identifier differs)",
    )
    add(
        "--parent-folder",
        metavar="DIR",
        action="append",
        default=[],
        help="where a parent may be, too, that the image names by a UUID and not by a file; may be given again",
    )
    add(
        "--backing-root",
        metavar="DIR",
        action="append",
        help="refuse parents, and other files that an image names, outside DIR; DIR may be an address such as"
        " https://HOST/DIR, below which alone what an image names elsewhere is opened; may be given again",
    )


def _add_access(add: _Add) -> None:
    add(
        "--key-file",
        metavar="[IMAGE=]FILE",
        action="append",
        help=f"the first line of FILE is the password of an encrypted image (else ${PASSWORD_VARIABLE}, else a prompt);"
        " IMAGE=FILE gives one image of the chain its own; may be given again",
    )
    add(
        "--cache",
        metavar="SIZE",
        type=size_argument,
        help="the most memory for the maps of the image and its parents (32M if not given); half as much again for "
        "clusters that it has unpacked",
    )
    add(
        "--remote-cache",
        metavar="DIR",
        help="keep what was fetched of images elsewhere in DIR, and take from there what is still the same",
    )
    add(
        "--remote-cache-size",
        metavar="SIZE",
        type=size_argument,
        help="the most bytes that are kept here of one image elsewhere (8G if not given, at least 64M)",
    )
    add_write_base_option(add)
    add("--direct", action="store_true", help="bypass the page cache of the host (O_DIRECT)")


def add_write_base_option(add: _Add) -> None:
    """Add --write-base, for commands that change a disk."""
    add("--write-base", action="store_true", help="write the image even if overlays lie over it, which that spoils")


def add_writing_options(parser: argparse.ArgumentParser, *, ends: str) -> None:
    """Add the ways to have a disk written that is served: in place, into an overlay, or until `ends` is gone."""
    access = parser.add_mutually_exclusive_group()
    access.add_argument("--rw", action="store_true", help="let the disk be written (else it is read-only)")
    access.add_argument("-r", "--ro", action="store_true", help="read-only: the default")
    scratch = parser.add_mutually_exclusive_group()
    scratch.add_argument(
        "--overlay",
        metavar="FILE",
        help="let the disk be written, into FILE: a qcow overlay over IMAGE, made if it is not there, and kept",
    )
    scratch.add_argument(
        "--temp",
        action="store_true",
        help=f"let the disk be written, into an unnamed file in $TMPDIR, else /var/tmp, that is gone with {ends}",
    )


def add_sector_size_option(parser: argparse.ArgumentParser) -> None:
    """Add --sector-size, for commands that look at a disk's partition table."""
    parser.add_argument(
        "--sector-size",
        metavar="BYTES",
        type=int,
        choices=SECTOR_SIZES,
        help="sectors of the disk that the partition table was made on: 512 (so an MBR is read), 1024, 2048 or 4096",
    )


def add_no_backing_option(parser: argparse.ArgumentParser) -> None:
    """Add --no-backing, for commands that can do with the image alone."""
    parser.add_argument(
        "--no-backing",
        action="store_true",
        help="look at IMAGE alone: no other file is opened or looked for because IMAGE names it",
    )


def open_options(
    arguments: argparse.Namespace, *, writable: bool = False, overlay: str | None = None, temporary: bool = False
) -> OpenOptions:
    """What the options of :func:`add_image_options` say."""
    from tapfs.disk.chain import OpenOptions
    from tapfs.disk.format_choice import SAY_RAW
    from tapfs.host.gate import Gate
    from tapfs.host.lock import Sharing

    if getattr(arguments, "no_backing", False):
        if arguments.backing is not None or arguments.backing_root is not None or arguments.backing_format:
            message = "--no-backing looks at no parent, so it does not go with --backing, -format or -root"
            raise ImageError(ErrorKind.INVALID_ARGUMENT, message, op="open")
        gate = Gate.nothing()
    else:
        gate = Gate() if arguments.backing_root is None else Gate.inside(*arguments.backing_root)
    return OpenOptions(
        format=arguments.format,
        disk=arguments.disk,
        writable=writable,
        backing=arguments.backing,
        backing_formats=tuple(arguments.backing_format),
        any_parent=arguments.any_parent,
        write_base=arguments.write_base,
        snapshot=arguments.snapshot,
        parent_folders=tuple(arguments.parent_folder),
        gate=gate,
        direct=arguments.direct,
        sharing=Sharing.UNCHECKED if arguments.force_share else Sharing.EXCLUSIVE,
        overlay=overlay,
        temporary=temporary,
        say_raw=getattr(arguments, "say_raw", SAY_RAW),
        cache_bytes=cache_bytes_of(arguments),
        remote=remote_options_of(arguments),
        cut=not writable and getattr(arguments, "salvage", False),
    )


def remote_options_of(arguments: argparse.Namespace) -> RemoteOptions:
    """How what lies elsewhere is read."""
    from tapfs.host.remote.options import LEAST_COPY_BYTES, USUAL

    size: int | None = arguments.remote_cache_size
    if size is not None and size < LEAST_COPY_BYTES:
        message = f"--remote-cache-size is at least {LEAST_COPY_BYTES >> 20}M"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, op="open")
    return replace(USUAL, kept_in=arguments.remote_cache, copy_bytes=USUAL.copy_bytes if size is None else size)


def cache_bytes_of(arguments: argparse.Namespace) -> int:
    """The bound of the map cache that --cache gives, or the default."""
    from tapfs.disk.chain import DEFAULT_CACHE_BYTES

    given: int | None = arguments.cache
    return DEFAULT_CACHE_BYTES if given is None else given


def open_image(
    arguments: argparse.Namespace,
    *,
    path: str | None = None,
    writable: bool = False,
    metadata_only: bool = False,
    overlay: str | None = None,
    temporary: bool = False,
    plan_log: PlanLog | None = None,
) -> Image:
    """The image that the arguments name (`path`, or else `arguments.image`), opened as they say.

    `overlay` and `temporary` as in :class:`tapfs.disk.chain.OpenOptions`, `plan_log` as for Image. Asks for a
    password only if the image is encrypted, and not for `metadata_only`. Raises ImageError.
    """
    from tapfs.disk import opening

    name: str = arguments.image if path is None else path
    options = open_options(arguments, writable=writable, overlay=overlay, temporary=temporary)
    return opened(
        arguments,
        name,
        lambda password: opening.open_image(
            name, options, password=password, metadata_only=metadata_only, plan_log=plan_log
        ),
    )


def opened(arguments: argparse.Namespace, name: str, attempt: Callable[[bytes | None], Image]) -> Image:
    """What `attempt` opens with the password of the arguments, and the sandbox knows of. Raises ImageError.

    A remark says which of its files are taken for raw against their names.
    """
    from tapfs.cli.guard import complain
    from tapfs.disk.misnamed import note_of_name

    image = unlocked(arguments.key_file, name, attempt)
    chain_was_opened(image)
    for layer in image.layers:
        if (note := note_of_name(layer)) is not None:
            complain("tapfs", f"{layer.path}: {note}")
    return image


def chain_was_opened(image: Image) -> None:
    """Tell the sandbox which files the chain has: nothing else of the host is for this process from now on."""
    from tapfs.host.sandbox.confinement import chain_is_open, is_entered

    if not is_entered():
        return
    chain_is_open(
        (file.real_path(), file.writable)
        for layer in image.layers
        for file in layer.files
        if os.fstat(file.descriptor).st_nlink > 0  # scratch space has no name, and is open
    )


def unlocked(key_file: str | Sequence[str] | None, path: str, attempt: Callable[[bytes | None], _Result]) -> _Result:
    """The result of `attempt` with the password from the key file or the environment, if any.

    Should it say that one is needed, it is tried again with one from the terminal.
    """
    password = given_password(key_file)
    try:
        return attempt(password)
    except ImageError as error:
        if error.kind is not ErrorKind.DENIED or error.op != "unlock" or password is not None:
            raise
    return attempt(prompt_for_password(f"Password of {printable(path)}: "))


def new_password(key_file: str | Sequence[str] | None, path: str) -> bytes:
    """The password for an image about to be made; asked for twice on a terminal."""
    password = given_password(key_file)
    if password is not None:
        return password
    password = prompt_for_password(f"New password of {printable(path)}: ")
    if prompt_for_password("Again: ") != password:
        raise ImageError(ErrorKind.DENIED, "the two passwords differ", path=path, op="unlock")
    return password


def prompt_for_password(question: str) -> bytes:
    """A password typed at the terminal. Raises ImageError(denied) where there is none."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise ImageError(
            ErrorKind.DENIED,
            "the image is encrypted and there is no terminal to ask for its password",
            op="unlock",
            remedy="give it with {password}",
        ) from None
    from getpass import getpass

    try:
        typed = getpass(question)
    except EOFError:
        _end_line()
        raise ImageError(ErrorKind.DENIED, "no password was given", op="unlock") from None
    except BaseException:  # Ctrl-C, above all
        _end_line()
        raise
    return nonempty(typed.encode(errors="surrogateescape"), "the password")


def _end_line() -> None:
    """End the line of the question on the terminal, which no key has ended."""
    with suppress(OSError), open("/dev/tty", "w") as terminal:
        terminal.write("\n")


def _may_be_noise(driver: Driver) -> bool:
    """Whether the image is encrypted and cannot tell that a password is wrong."""
    from tapfs.driver import PasswordProving

    encrypted = driver.geometry.cipher is not None
    return encrypted and not (isinstance(driver, PasswordProving) and driver.proves_password)


def warn_of_noise(image: Image) -> None:
    """Say on stderr if an encrypted image, unlocked, shows nothing known: its password may be wrong.

    What never was written reads as zeros with every password, so a new disk is no reason to warn.
    """
    if image.needs_password or not any(_may_be_noise(layer.driver) for layer in image.layers):
        return
    contents = image.contents()
    if contents.file_system is not None or contents.table.scheme is not None:
        return
    if any(image.read(0, min(image.size, _NOISE_BYTES))):
        from tapfs.cli.guard import complain

        complain(
            "tapfs",
            f"{printable(image.path)}: with this password there is no partition table and no file system that tapfs"
            " knows; is the password right? the image itself cannot tell",
        )
