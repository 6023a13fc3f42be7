"""`mount.fuse.tapfs`: what mount(8) runs for the type fuse.tapfs, by hand or from /etc/fstab.

It has the argument order of mount(8)'s helpers, `IMAGE DIR [-sfnvi] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]`,
and its exit codes: 1 for a wrong call, 32 for a mount that failed.
"""

from __future__ import annotations

import sys

from tapfs.cli.guard import guarded
from tapfs.cli.mount_options import words_for
from tapfs.cli.parser import Parser
from tapfs.errors import EXIT_USAGE

_PROGRAM = "mount.fuse.tapfs"
_DESCRIPTION = """\
The helper that mount(8) runs for 'mount -t fuse.tapfs IMAGE DIR -o OPTIONS' and for lines like
  /srv/disk.qcow  /mnt/disk  fuse.tapfs  ro,allow_other,nofail  0 0
in /etc/fstab. mount(8) looks for it in /sbin only; install it there once:
  ln -s "$(command -v mount.fuse.tapfs)" /sbin/

mount(8) asks for a writable mount unless ro is among the OPTIONS.
OPTIONS: rw, ro, allow_other, uid=, gid=, umask=, and as the options of 'tapfs mount' of these
names: files, partition=, sector_size=, format=, overlay=, temp, engine=, key_file=, backing=, backing_format=,
backing_root=, direct, force_share. Generic ones (nofail, noauto, x-...) are left to mount(8)."""

#: Exit codes of mount(8).
_WRONG_CALL = 1
_FAILED = 32


def main(argv: list[str] | None = None) -> int:
    """Mount as the words of mount(8) say."""
    words = sys.argv[1:] if argv is None else argv
    code = guarded(_PROGRAM, lambda: _mount(words), options_way="mount_option")
    if code == EXIT_USAGE:
        return _WRONG_CALL
    return _FAILED if code else 0


def _mount(words: list[str]) -> int:
    from tapfs.cli.main import run_command

    parser = Parser(prog=_PROGRAM, description=_DESCRIPTION)
    parser.add_argument("image", metavar="IMAGE", help="a file, a block device or ram:NAME")
    parser.add_argument("mountpoint", metavar="DIR", help="the directory to mount on")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="see above")
    parser.add_argument("-f", dest="fake", action="store_true", help="look at the words, but mount nothing")
    for letter in "snvi":
        parser.add_argument(f"-{letter}", action="store_true", help="accepted, without effect")
    for letter in "Nt":
        parser.add_argument(f"-{letter}", help="accepted, without effect")
    arguments = parser.parse(words)
    options = words_for(",".join(arguments.options), _PROGRAM)
    if arguments.fake:
        return 0
    return run_command("mount", [*options, "--", arguments.image, arguments.mountpoint])
