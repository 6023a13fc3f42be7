"""`tapfs mount`: an image as a directory with `disk`, its flat contents, its partitions and `info.json`."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from tapfs.cli.mount_options import settings_of, wants_writing
from tapfs.cli.options import (
    IMAGE_HELP,
    add_image_options,
    add_sector_size_option,
    add_writing_options,
    open_options,
    opened,
    warn_of_noise,
)
from tapfs.cli.parser import UsageError
from tapfs.errors import ImageError
from tapfs.fuse.engine_names import AUTO, ENGINES, PYFUSE3
from tapfs.host import standard_input
from tapfs.host.location import locate
from tapfs.records import replace

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.disk.image import Image
    from tapfs.fuse.files.choice import FileSystemPlace
    from tapfs.fuse.outside import Outside
    from tapfs.fuse.registry import Registry
    from tapfs.fuse.settings import MountSettings
    from tapfs.fuse.verified_reads import VerifiedReads

_DESCRIPTION = """\
Mount IMAGE on the directory DIR: DIR/disk is the flat disk, DIR/part1, part2, ... the
partitions that it has when it is mounted, DIR/info.json what 'tapfs info --json' prints. DIR/snapshots has
the disks that the image keeps beside its current one, read-only, '/' and '%' of their names as %2F and %25.
Returns when the mount is ready; 'tapfs umount DIR' ends it.

The file systems inside are mounted from there, for example:
  mount -o loop,ro DIR/part1 /mnt

With --overlay or --temp the disk can be written, whatever its format, and IMAGE stays as it
is: boot, check or edit it without a copy. Writes through DIR/disk and DIR/part1 reach the same
disk, but like the kernel's own sda and sda1 each has a cache: use one of them at a time.

With --files DIR shows the files inside instead: by the kernel's file system for root, else by
a FUSE file system such as fuse2fs. 'tapfs umount DIR' writes everything back and ends it all.
Set-user-ID bits and device nodes in there have no effect unless -o suid,dev is said. A journal
is replayed only if the disk can be written; --temp lets it without changing IMAGE."""

_PROGRAM = "tapfs mount"


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("mount", help="mount an image on a directory", description=_DESCRIPTION)
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("mountpoint", metavar="DIR", help="the directory to mount on")
    add_writing_options(parser, ends="the mount")
    parser.add_argument("--files", action="store_true", help="show the files inside instead of the disk")
    parser.add_argument(
        "--partition",
        metavar="N",
        type=int,
        help="with --files: those of partition N, 0: of the whole disk; without it the only file system on it is taken",
    )
    add_sector_size_option(parser)
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="ro, rw: as --ro and --rw; allow_other: let other users in (umask=022 unless said otherwise);"
        " uid=N, gid=N, umask=NNN: owner and mode of the files; noexec; with --files also suid, dev,"
        " nonempty (for a FUSE program), and discard and errors=WHAT for the kernel's file system",
    )
    parser.add_argument(
        "--verify-reads",
        action="store_true",
        help="prove each read by the sidecar that 'tapfs hash' has made: what is not as it was hashed is an error (EIO)"
        " and is logged; read-only, by the engine pyfuse3",
    )
    parser.add_argument(
        "--sidecar", metavar="FILE", help="with --verify-reads: the sidecar (as 'tapfs hash' names it if not given)"
    )
    parser.add_argument(
        "--as",
        dest="faces",
        metavar="FORMAT[,FORMAT...]",
        action="append",
        default=[],
        help="show the disk as an image of each FORMAT, too: DIR/disk.qcow2, disk.vhdx, disk.vmdk, disk.vdi, disk.vhd;"
        " its metadata is made when it is first looked at, its data is the disk's; read-only",
    )
    parser.add_argument("--foreground", action="store_true", help="stay until the mount ends; Ctrl-C unmounts")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=AUTO,
        help="who serves the disk: the kernel itself (passthrough, for flat images), native threads, or pyfuse3;"
        " auto, the default, takes the best that works",
    )
    add_image_options(parser)
    parser.set_defaults(run=run, again=False)


def run(arguments: argparse.Namespace) -> int:
    """Mount, and return when the mount answers (with --foreground: when it has ended).

    `arguments.again`: an image that is mounted so already is no error.
    """
    from tapfs.cli.waiting import told_of_waiting
    from tapfs.errors import spelled
    from tapfs.fuse import mounting
    from tapfs.fuse.registry import Registry
    from tapfs.fuse.reopening import Reopening
    from tapfs.fuse.silence import real_place, what_is_waited_for
    from tapfs.fuse.stored_mount import let_end, take_away_what_ended, taken
    from tapfs.serving.background import open_descriptors, start_in_background

    inherited = open_descriptors()  # before anything of ours is open
    if not arguments.mountpoint:
        raise UsageError("DIR is empty", _PROGRAM)
    if arguments.partition is not None and not arguments.files:
        wrong = spelled("{partition=N} is for {files}; the disk's partitions are DIR/part1 and so on")
        raise UsageError(wrong, _PROGRAM)
    settings = settings_of(arguments.options, _PROGRAM, files=arguments.files)
    settings = replace(
        settings,
        sector_size=arguments.sector_size,
        source=mounting.real_name(arguments.image),
        overlay="" if arguments.temp else arguments.overlay and os.path.realpath(arguments.overlay),
    )
    scratch = arguments.temp or arguments.overlay is not None
    writable = wants_writing(arguments.options, _PROGRAM, ro=arguments.ro, rw=arguments.rw, scratch=scratch)
    _check_verified(arguments, writable=writable or scratch)
    settings = replace(
        settings, confined=_confines_programs(arguments), faces=_faces(arguments, writable=writable or scratch)
    )
    settings.require_permission()
    mounting.require_fuse()
    registry = Registry()
    if arguments.again and mounting.is_mounted_so(
        registry,
        arguments.mountpoint,
        settings,
        files=arguments.files,
        partition=arguments.partition,
        writable=writable or scratch,
        verified=arguments.verify_reads,
    ):
        return 0
    left = taken() if arguments.foreground else None
    goes_on = left is not None and not take_away_what_ended(left, real_place(arguments.mountpoint))
    with told_of_waiting(partial(what_is_waited_for, arguments.mountpoint)):
        mountpoint = (real_place if goes_on else mounting.check_mount_point)(arguments.mountpoint)
    outside = _entered(arguments, mountpoint, settings, registry, writable=writable or scratch)
    options = open_options(arguments, writable=writable, overlay=arguments.overlay, temporary=arguments.temp)
    opening = Reopening(arguments.image, options, keeps_plan=_can_be_kept(arguments, writable=writable))
    plan = registry.plan_file(os.getpid())
    attempt = opening.open if left is None else partial(opening.follow, left, plan)
    try:
        image = opened(arguments, arguments.image, attempt)
    except BaseException:
        _end(outside)
        raise
    try:
        if left is not None and not goes_on:
            let_end(left)
            registry.entries()  # drops what the killed processes have left there
        warn_of_noise(image)
        for name in settings.faces:
            _require_face(name, image)
        if arguments.files:
            settings = replace(settings, files=_chosen(image, arguments))
        verified = _verified(image, arguments) if arguments.verify_reads else None
    except BaseException:
        image.close()
        _end(outside)
        raise
    reopening = opening if _can_be_kept(arguments, writable=writable) else None
    mount = mounting.ImageMount(
        image,
        mountpoint,
        registry,
        arguments.engine,
        settings,
        verified,
        outside,
        reopening,
        foreground=arguments.foreground,
    )
    if left is not None and goes_on:
        image.close()  # the server opens it again
        mounting.serve_in_foreground(mount, left.kept)
    elif arguments.foreground:
        mounting.serve_in_foreground(mount)
    else:
        start_in_background(mount, inherited)
    return 0


def _confines_programs(arguments: argparse.Namespace) -> bool:
    """Whether the program that shows the files, if there is one, is to be in a sandbox."""
    if not arguments.files or arguments.no_sandbox:
        return False
    from tapfs.host.sandbox import confinement, supervised

    return not confinement.is_switched_off() and supervised.is_possible()


def _end(outside: Outside | None) -> None:
    if outside is not None:
        outside.end()


def _faces(arguments: argparse.Namespace, *, writable: bool) -> tuple[str, ...]:
    """The formats that --as names, each once."""
    names = tuple(dict.fromkeys(name for text in arguments.faces for name in text.split(",")))
    if "" in names:
        raise UsageError("--as takes names of formats with commas between", _PROGRAM)
    if names and writable:
        message = "--as is for read-only mounts: the metadata of an image is made for a disk that does not change"
        raise UsageError(message, _PROGRAM)
    if names and arguments.files:
        raise UsageError("--as goes with DIR/disk, not with --files", _PROGRAM)
    return names


def _require_face(name: str, image: Image) -> None:
    from tapfs.jobs.face import require_face

    try:
        require_face(name, image.size)
    except ImageError as error:
        error.path = image.path
        raise


def _entered(
    arguments: argparse.Namespace, mountpoint: str, settings: MountSettings, registry: Registry, *, writable: bool
) -> Outside | None:
    """Enter the sandbox; who mounts from outside of it. None: there is no sandbox.

    The files inside are mounted from outside of it in any case: who serves the disk must not wait for that.
    """
    from tapfs.cli.sandboxed import enter_server
    from tapfs.host.sandbox.confinement import is_switched_off

    sandboxed = arguments.owned and not arguments.no_sandbox and not is_switched_off()
    if not sandboxed and not arguments.files:
        return None
    from tapfs.fuse.files.mount_process import FilesWords
    from tapfs.fuse.outside import Outside, options_of
    from tapfs.fuse.settings import for_hidden_mount

    files = FilesWords(arguments.image, mountpoint, settings, writable) if arguments.files else None
    shown = for_hidden_mount() if arguments.files else settings
    outside = Outside(mountpoint, options_of(settings.source, shown, writable=writable), registry, files)
    outside.start()
    # A password is asked for by the terminal's own name.
    try:
        if sandboxed:
            enter_server(arguments, makes=(str(registry.directory),), writes=("/dev/fuse",))
    except BaseException:
        outside.end()
        raise
    return outside


def _check_verified(arguments: argparse.Namespace, *, writable: bool) -> None:
    if arguments.sidecar is not None and not arguments.verify_reads:
        raise UsageError("--sidecar goes with --verify-reads", _PROGRAM)
    if arguments.verify_reads and (writable or arguments.engine not in (AUTO, PYFUSE3)):
        raise UsageError("--verify-reads is for read-only mounts by the engine pyfuse3", _PROGRAM)


def _verified(image: Image, arguments: argparse.Namespace) -> VerifiedReads:
    """What proves the reads; says so if the image is not known to be the one that was hashed."""
    from tapfs.cli.commands.hash import sidecar_of
    from tapfs.cli.guard import complain
    from tapfs.disk.sidecar import Sidecar
    from tapfs.errors import printable
    from tapfs.fuse.verified_reads import VerifiedReads

    sidecar = Sidecar(sidecar_of(arguments))
    try:
        verified = VerifiedReads(image, sidecar)
        untouched = verified.untouched
    except BaseException:
        sidecar.close()
        raise
    if not untouched:
        complain(
            "tapfs",
            f"{printable(image.path)}: its files are not those that were hashed, or were written since:"
            " reads of what differs will fail",
        )
    return verified


def _can_be_kept(arguments: argparse.Namespace, *, writable: bool) -> bool:
    """Whether the mount can go on with another server when its server was killed (`tapfs.fuse.keeper`).

    What came from standard input is gone with its process. What a killed server has under way to a place elsewhere goes
    on, and nobody could wait for it.
    """
    if writable and locate(arguments.image).address is not None:
        return False
    return bool(arguments.image != standard_input.NAME)


def _chosen(image: Image, arguments: argparse.Namespace) -> FileSystemPlace:
    """The file system to show; says so if it will look as a crash has left it."""
    from tapfs.fuse.files.choice import choose_file_system

    place = choose_file_system(image, arguments.partition, name=arguments.image, sector_size=arguments.sector_size)
    _warn_if_unclean(place, writable=image.writable)
    return place


def _warn_if_unclean(place: FileSystemPlace, *, writable: bool) -> None:
    """Say on stderr what is to be expected of a file system that was not unmounted cleanly."""
    from tapfs.cli.guard import complain
    from tapfs.errors import printable, spelled
    from tapfs.partitions.cleanliness import Unclean

    what = f"{printable(place.image)}: the {place.type} file system was not unmounted cleanly"
    if place.unclean is Unclean.REPLAY and not writable:
        complain(
            "tapfs",
            f"{what} and is shown without the changes that only its journal has; "
            + spelled("{temp} or {rw} replays it"),
        )
    elif place.unclean is Unclean.CHECK:
        complain("tapfs", f"{what}: what was being written then may be damaged; check it (fsck, chkdsk)")
