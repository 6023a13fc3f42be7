"""`tapfs amend`: change what was chosen when an image was made."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tapfs.cli.options import add_changed_image_options, open_options, unlocked
from tapfs.cli.parser import UsageError
from tapfs.cli.qemu_words import add_qemu_words, is_direct
from tapfs.cli.reporting import add_progress_options, print_line
from tapfs.cli.sizes import whole_number
from tapfs.cli.targets import format_options, print_options_of, wants_help

if TYPE_CHECKING:
    from tapfs.cli.parser import Subparsers

_PROGRAM = "tapfs amend"
#: The option that the size of a disk has for qemu-img.
_SIZE = "size"
_ENCRYPT = "encrypt."
_LONGEST_MILLISECONDS = 100_000


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "amend",
        help="change what was chosen when an image was made",
        description="Change options of the image FILE in place: of qcow2 the version (compat), lazy_refcounts,\n"
        "refcount_bits, the compression type while nothing is compressed, and what it says of a data file; the\n"
        "passwords of LUKS, in qcow2 or by itself. The disk stays the same.\n"
        "What the image cannot be is refused, and nothing is changed; what was interrupted is begun anew.\n"
        "'-o help' lists the options of a format.",
    )
    parser.add_argument("image", metavar="FILE", nargs="?", help="the image")
    parser.add_argument(
        "-o",
        dest="options",
        metavar="KEY=VALUE,...",
        action="append",
        default=[],
        help="what the image is to be; '-o help' lists the options",
    )
    parser.add_argument("--new-key-file", metavar="FILE", help="the first line of FILE becomes a password, too")
    parser.add_argument("--old-key-file", metavar="FILE", help="the first line of FILE is no password any more")
    add_progress_options(parser)
    add_changed_image_options(parser)
    add_qemu_words(parser, "-t")
    parser.add_argument("--force", action="store_true", help="accepted: no amendment needs it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Amend it."""
    if wants_help(arguments):
        return _help(arguments)
    if arguments.image is None:
        raise UsageError("FILE is missing", _PROGRAM)
    options = format_options(arguments.options, _PROGRAM)
    states = {"active": arguments.new_key_file, "inactive": arguments.old_key_file}
    named = [state for state, key_file in states.items() if key_file is not None]
    if len(named) == 1:
        options.setdefault(f"{_ENCRYPT}state", named[0])
    if not options:
        raise UsageError("-o is missing: it says what is to be changed", _PROGRAM)
    if _SIZE in options:
        raise UsageError("-o size is 'tapfs resize'", _PROGRAM)
    if any(name.startswith(_ENCRYPT) for name in options):
        return _change_passwords(arguments, options)
    from tapfs.jobs.amend import amend_image

    arguments.direct = arguments.direct or is_direct(arguments.cache_t)
    opened = open_options(arguments, writable=True)
    unlocked(
        arguments.key_file,
        arguments.image,
        lambda password: amend_image(arguments.image, options, opened, password=password),
    )
    return 0


def _change_passwords(arguments: argparse.Namespace, options: dict[str, str]) -> int:
    """Add a password, or take one away."""
    from tapfs.disk.password import given_password, password_missing
    from tapfs.driver import SlotChange
    from tapfs.jobs.amend import change_passwords

    asked = {name.removeprefix(_ENCRYPT): value for name, value in options.items()}
    for secret in ("new-secret", "old-secret"):
        if secret in asked:
            raise UsageError(f"encrypt.{secret} is --{secret[:3]}-key-file FILE here", _PROGRAM)
    state, slot, time = asked.pop("state", ""), asked.pop("keyslot", None), asked.pop("iter-time", "2000")
    if asked or any(not name.startswith(_ENCRYPT) for name in options):
        raise UsageError("passwords change by encrypt.state, .keyslot and .iter-time, without other options", _PROGRAM)
    adds = state == "active"
    key_file = arguments.new_key_file if adds else arguments.old_key_file
    if state not in ("active", "inactive") or (key_file is None and (adds or slot is None)):
        message = "encrypt.state=active needs --new-key-file, inactive --old-key-file or encrypt.keyslot"
        raise UsageError(message, _PROGRAM)
    try:
        number, milliseconds = None if slot is None else whole_number(slot), whole_number(time)
    except ValueError as error:
        raise UsageError(f"encrypt.keyslot and encrypt.iter-time are numbers: {error}", _PROGRAM) from None
    if not 1 <= milliseconds <= _LONGEST_MILLISECONDS:
        raise UsageError(f"encrypt.iter-time is a number from 1 to {_LONGEST_MILLISECONDS}", _PROGRAM)
    other = b"" if key_file is None else given_password(key_file) or b""
    opened = open_options(arguments, writable=True)

    def attempt(password: bytes | None) -> None:
        if password is None:
            raise password_missing(arguments.image)
        change_passwords(arguments.image, opened, SlotChange(adds, password, other, number, milliseconds))

    unlocked(arguments.key_file, arguments.image, attempt)
    return 0


def _help(arguments: argparse.Namespace) -> int:
    from tapfs.disk.probe import format_named
    from tapfs.driver import AmendableFormat

    if arguments.format is None:
        raise UsageError("-o help needs -f", _PROGRAM)
    found = format_named(arguments.format)
    if not isinstance(found, AmendableFormat):
        print_line(f"nothing can be amended in {arguments.format} images.")
        return 0
    return print_options_of(arguments.format, found.amend_options)
