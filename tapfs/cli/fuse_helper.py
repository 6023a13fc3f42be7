"""`mount.fuse.tapfs`: what mount(8) runs for the type fuse.tapfs, by hand or from /etc/fstab.

It has the argument order of mount(8)'s helpers, `IMAGE DIR [-sfnvi] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]`,
and its exit codes: 1 for a wrong call, 32 for a mount that failed.
"""

from __future__ import annotations

import os
import sys

from tapfs.cli.guard import guarded
from tapfs.cli.mount_options import last_access, wants_remount, words_for
from tapfs.cli.parser import Parser, UsageError
from tapfs.errors import EXIT_USAGE

_PROGRAM = "mount.fuse.tapfs"
_DESCRIPTION = """\
The helper that mount(8) runs for 'mount -t fuse.tapfs IMAGE DIR -o OPTIONS' and for lines like
  /srv/disk.qcow  /mnt/disk  fuse.tapfs  ro,allow_other,nofail  0 0
in /etc/fstab. mount(8) looks for it in /sbin only, where the package of Debian has it, also as mount.tapfs for the
type tapfs. After pip install it there once:
  ln -s "$(command -v mount.fuse.tapfs)" /sbin/

mount(8) asks for a writable mount unless ro is among the OPTIONS.
OPTIONS: rw, ro, allow_other, uid=, gid=, umask=, and as the options of 'tapfs mount' of these names: files,
partition=, sector_size=, format=, snapshot=, overlay=, temp, engine=, key_file=, backing=, backing_format=,
backing_root=, any_parent, as=, disk=, parent_folder=, cache=, remote_cache=, remote_cache_size=, direct, force_share,
no_sandbox, write_base. With files also noexec, nonempty, discard and errors= for the kernel's file system (suid and
dev stay off: mount(8) does not pass them on). nofail: an IMAGE that is missing is no error. remount,ro and
remount,rw change a mount that is there. Generic ones (noauto, x-...) are left to mount(8), those of FUSE
(default_permissions, big_writes, max_read=) have no effect. An image that is mounted on DIR already, and shows the
same, is no error."""

#: Exit codes of mount(8).
_WRONG_CALL = 1
_FAILED = 32


def main(argv: list[str] | None = None) -> int:
    """Mount as the words of mount(8) say."""
    words = sys.argv[1:] if argv is None else argv
    return _exit_code(guarded(_PROGRAM, lambda: _mount(words, owned=argv is None), options_way="mount_option"))


def is_call_of_mount_fuse(words: list[str]) -> bool:
    """Whether these are the words that mount.fuse gives to the program `tapfs`: IMAGE DIR -o OPTIONS."""
    is_call = len(words) == 4 and words[2] == "-o" and not words[0].startswith("-")
    return is_call and (words[1].startswith("/") or os.path.isdir(words[1]))


def mount_for_mount_fuse(words: list[str], *, owned: bool = False) -> int:
    """Mount as mount.fuse asks, which mount(8) runs for fuse.tapfs where our helper is not in /sbin.

    For root it adds the options dev and suid by itself, so these say nothing here. `owned` as for `run_command`.
    """
    options = ",".join(option for option in words[3].split(",") if option not in {"dev", "suid"})
    return _exit_code(guarded("tapfs", lambda: _mount([*words[:3], options], owned=owned), options_way="mount_option"))


def parser_of_helper() -> Parser:
    """The parser of the words that mount(8) gives."""
    parser = Parser(prog=_PROGRAM, description=_DESCRIPTION)
    parser.add_argument(
        "image", metavar="IMAGE", help="a file, a block device, ram:NAME or an address such as https://HOST/FILE"
    )
    parser.add_argument("mountpoint", metavar="DIR", help="the directory to mount on")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="see above")
    parser.add_argument("-f", dest="fake", action="store_true", help="look at the words, but mount nothing")
    for letter in "snvi":
        parser.add_argument(f"-{letter}", action="store_true", help="accepted, without effect")
    for letter in "Nt":
        parser.add_argument(f"-{letter}", help="accepted, without effect")
    return parser


def _exit_code(code: int) -> int:
    if code == EXIT_USAGE:
        return _WRONG_CALL
    return _FAILED if code else 0


def _mount(words: list[str], *, owned: bool) -> int:
    from tapfs.cli.main import parsed_command

    parser = parser_of_helper()
    arguments = parser.parse(words)
    options = ",".join(arguments.options)
    if wants_remount(options):
        from tapfs.fuse.remounting import remount

        if not arguments.fake:
            remount(arguments.mountpoint, writable=last_access(options))
        return 0
    try:
        command = parsed_command("mount", [*words_for(options, _PROGRAM), "--", arguments.image, arguments.mountpoint])
        command.again, command.owned = True, owned
        if arguments.fake or ("nofail" in options.split(",") and _is_missing(arguments.image)):
            return 0
        code: int = command.run(command)
    except UsageError as error:
        raise UsageError(str(error), _PROGRAM) from None
    return code


def _is_missing(image: str) -> bool:
    """Whether there is no such image, as opposed to one that cannot be used."""
    from tapfs.host.location import locate

    return not os.path.exists(locate(image).host_path)
