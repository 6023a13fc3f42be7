"""`tapfs serve`: disks for clients that speak NBD, such as QEMU or nbdcopy, or for a virtual machine."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from tapfs.cli.options import (
    IMAGE_HELP,
    add_image_options,
    add_writing_options,
    open_image,
    open_options,
    warn_of_noise,
)
from tapfs.cli.parser import UsageError
from tapfs.cli.reporting import print_lines

if TYPE_CHECKING:
    import argparse
    import socket

    from tapfs.cli.parser import Subparsers
    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog
    from tapfs.kernel.nbd_tls import TlsServer
    from tapfs.nbd.sockets import Address
    from tapfs.serving.pid_file import PidFile
    from tapfs.serving.served_operations import OpenedBy
    from tapfs.serving.server_start import ServerStart

_DESCRIPTION = """\
Serve the disk of IMAGE to clients that speak NBD: QEMU, nbdcopy, nbd-client of Linux and others.
Prints the address for clients once they may come, and serves until Ctrl-C or a signal ends it.
What clients have flushed is on the disk then, whatever ends the server.

The address is a Unix socket that only you may connect to, unless --tcp is said, or systemd has
opened the socket (LISTEN_FDS). Whoever reaches a TCP port gets in, unless TLS asks who it is:
--tls-psk FILE, or --tls-certificates DIR with --tls-verify-clients. Of several images each is
an export under the name of its file. For example:
  tapfs serve disk.vhdx --socket /tmp/disk.sock
  nbdcopy 'nbd+unix:///?socket=/tmp/disk.sock' disk.raw
  qemu-system-x86_64 -drive file='nbd+unix:///?socket=/tmp/disk.sock',format=raw,if=virtio

With --vhost-user PATH the disk is that of a virtual machine, as a vhost-user-blk device: for QEMU,
cloud-hypervisor and crosvm. The machine needs memory that is shared:
  tapfs serve disk.vhdx --rw --vhost-user /tmp/disk.sock
  qemu-system-x86_64 -m 2G -object memory-backend-memfd,id=memory,size=2G -machine memory-backend=memory \\
      -chardev socket,id=disk,path=/tmp/disk.sock,reconnect=1 -device vhost-user-blk-pci,chardev=disk

With --overlay or --temp the disk can be written, whatever its format, and IMAGE stays as it is."""

_PROGRAM = "tapfs serve"


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "serve", help="serve images to NBD clients, or to a virtual machine", description=_DESCRIPTION
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("more", metavar="IMAGE", nargs="*", help="further images; all options hold for each")
    add_writing_options(parser, ends="the server")
    parser.add_argument("--socket", metavar="PATH", help="the Unix socket; without it one in the runtime directory")
    parser.add_argument(
        "--tcp",
        metavar="HOST:PORT",
        action="append",
        default=[],
        type=_tcp_address,
        help="listen there instead; port 10809 if none is said, any that is free for 0. --socket goes with it",
    )
    parser.add_argument(
        "--tls-certificates",
        metavar="DIR",
        help="have clients use TLS: server-cert.pem and server-key.pem in DIR are shown to them",
    )
    parser.add_argument("--tls-verify-clients", action="store_true", help="clients need one of ca-cert.pem in DIR, too")
    parser.add_argument(
        "--tls-psk", metavar="FILE", help="have clients use TLS with a key that stands in FILE, as psktool makes it"
    )
    parser.add_argument(
        "--name",
        metavar="NAME",
        action="append",
        default=[],
        help="the name of the export; given again, that of the next image's. Clients that name none get the first. "
        "With --vhost-user the serial number of the disk, of which 20 bytes count",
    )
    parser.add_argument(
        "--vhost-user",
        metavar="PATH",
        help="serve the disk to a virtual machine instead: the Unix socket to which it connects",
    )
    parser.add_argument(
        "--wait-on",
        choices=("space", "errors", "nothing"),
        help="with --vhost-user: have the guest wait, until 'tapfs resume' or a later try succeeds, instead of telling "
        "it of an error: where the host is full (the default), also where its disk fails, or never",
    )
    parser.add_argument("--exit-when-idle", action="store_true", help="end when the last client has gone")
    parser.add_argument("--background", action="store_true", help="return when clients may come; kill ends the server")
    parser.add_argument("--pid-file", metavar="FILE", help="write the number of the serving process into FILE")
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until the end (with --background: return when clients may come)."""
    from tapfs.serving.background import open_descriptors

    inherited = open_descriptors()  # before anything of ours is open
    if arguments.ro and (arguments.overlay is not None or arguments.temp):
        raise UsageError("--ro does not go with --overlay and --temp, which let the disk be written", _PROGRAM)
    return _serve_guest(arguments, inherited) if arguments.vhost_user is not None else _serve_nbd(arguments, inherited)


def _serve_nbd(arguments: argparse.Namespace, inherited: frozenset[int]) -> int:
    from tapfs.nbd.export_names import export_names
    from tapfs.nbd.session import Serving, Session
    from tapfs.serving.server_start import ServerStart, put_away

    paths = [arguments.image, *arguments.more]
    if arguments.wait_on is not None:
        raise UsageError("--wait-on is for --vhost-user: an NBD client is told of every error", _PROGRAM)
    if arguments.overlay is not None and arguments.more:
        raise UsageError("--overlay is for one image", _PROGRAM)
    exports = export_names(arguments.name, paths)
    tls = _tls(arguments)
    listeners, paths_of_sockets = _listen(arguments)
    sockets = [path for path in paths_of_sockets if path is not None]
    addresses = [_addresses(arguments, export, listeners, paths_of_sockets) for export in exports]
    if tls is None or not (arguments.tls_psk or arguments.tls_verify_clients):
        _warn_of_strangers(listeners, writable=arguments.rw)
    pid_file = _pid_file(arguments, listeners, sockets)
    images: list[Image] = []
    try:
        _enter(arguments, sockets, pid_file)
        for path in paths:
            images.append(_open(arguments, path))
            warn_of_noise(images[-1])
    except BaseException:
        put_away(images, listeners, sockets, pid_file)
        raise
    named = list(zip(images, exports, strict=True))
    session = Session(
        Serving(
            named,
            listeners,
            addresses,
            _opened_by(arguments),
            sockets,
            exit_when_idle=arguments.exit_when_idle,
            tls=tls,
        )
    )
    start = ServerStart(session.run, images, listeners, sockets, pid_file)
    return _run(arguments, start, inherited, addresses[0])


def _serve_guest(arguments: argparse.Namespace, inherited: frozenset[int]) -> int:
    from tapfs.serving.listening import listen_locally
    from tapfs.serving.server_start import ServerStart, put_away
    from tapfs.vhost.recovery import KeptPlanOf
    from tapfs.vhost.session import Session

    if arguments.more or len(arguments.name) > 1:
        raise UsageError("--vhost-user is for one image; start a server for each disk of the machine", _PROGRAM)
    if (
        arguments.socket
        or arguments.tcp
        or arguments.tls_certificates
        or arguments.tls_verify_clients
        or arguments.tls_psk
    ):
        raise UsageError("--socket, --tcp and --tls options are for NBD clients, not for --vhost-user", _PROGRAM)
    path = os.path.abspath(arguments.vhost_user)
    name: str = arguments.name[0] if arguments.name else os.path.basename(arguments.image)
    listener = listen_locally(path)
    pid_file = _pid_file(arguments, [listener], [path])
    images: list[Image] = []
    try:
        _enter(arguments, [path], pid_file)
        written: str | None = arguments.overlay or (arguments.image if arguments.rw and not arguments.temp else None)
        kept = KeptPlanOf(written) if written is not None and "://" not in written else None
        if kept is not None:
            kept.complete(open_options(arguments))
        images.append(_open(arguments, arguments.image, plan_log=None if kept is None else kept.log))
        warn_of_noise(images[0])
    except BaseException:
        put_away(images, [listener], [path], pid_file)
        raise
    session = Session(
        images[0],
        identifier=os.fsencode(name),
        listeners=[listener],
        sockets=[path],
        exit_when_idle=arguments.exit_when_idle,
        kept=kept,
        opened=_opened_by(arguments),
        wait_on=arguments.wait_on or "space",
    )
    return _run(arguments, ServerStart(session.run, images, [listener], [path], pid_file), inherited, [path])


def _enter(arguments: argparse.Namespace, sockets: list[str], pid_file: PidFile | None) -> None:
    """Enter the sandbox of a server, once it listens."""
    from tapfs.cli.sandboxed import enter_server
    from tapfs.host.sandbox.confinement import folder_of
    from tapfs.serving.disk_sandbox import folders_of_disks
    from tapfs.serving.runtime_directory import make_private, runtime_directory

    make_private(runtime_directory())
    # A snapshot of a disk in use makes its file beside the image.
    written = [*arguments.more, arguments.image] if arguments.rw and not arguments.temp else []
    named = [*sockets, *([] if pid_file is None else [pid_file.place])]
    enter_server(
        arguments,
        makes=(str(runtime_directory()), *folders_of_disks(written)),
        removes=tuple(map(folder_of, named)),
    )


def _open(arguments: argparse.Namespace, path: str, plan_log: PlanLog | None = None) -> Image:
    from tapfs.host.location import locate

    # The server leaves the folder in which it was started.
    return open_image(
        arguments,
        path=locate(path).absolute().name,
        writable=arguments.rw,
        overlay=None if arguments.overlay is None else os.path.abspath(arguments.overlay),
        temporary=arguments.temp,
        plan_log=plan_log,
    )


def _opened_by(arguments: argparse.Namespace) -> OpenedBy:
    from tapfs.serving.served_operations import OpenedBy

    return OpenedBy(arguments.format, arguments.key_file or ())


def _pid_file(arguments: argparse.Namespace, listeners: list[socket.socket], sockets: list[str]) -> PidFile | None:
    """The file that the number of the server is to be in, open; the sockets are put away where it cannot be."""
    if not arguments.pid_file:
        return None
    from tapfs.serving.pid_file import PidFile
    from tapfs.serving.server_start import put_away

    try:
        return PidFile(arguments.pid_file)
    except BaseException:
        put_away([], listeners, sockets, None)
        raise


def _run(arguments: argparse.Namespace, start: ServerStart, inherited: frozenset[int], addresses: list[str]) -> int:
    """Serve here or in the background; print the addresses once clients may come."""
    from tapfs.serving.background import start_in_background
    from tapfs.serving.server_start import serve_in_foreground

    if not arguments.background:
        serve_in_foreground(start, lambda: _print(addresses))
        return 0
    start_in_background(start, inherited - {listener.fileno() for listener in start.listeners})
    _print(addresses)
    return 0


def _tcp_address(text: str) -> Address:
    from argparse import ArgumentTypeError

    from tapfs.nbd.sockets import tcp_address

    try:
        return tcp_address(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _tls(arguments: argparse.Namespace) -> TlsServer | None:
    """What the options say of TLS."""
    if arguments.tls_verify_clients and arguments.tls_certificates is None:
        raise UsageError("--tls-verify-clients needs --tls-certificates", _PROGRAM)
    if arguments.tls_certificates is None and arguments.tls_psk is None:
        return None
    from tapfs.nbd.tls import tls_server

    return tls_server(
        certificates=arguments.tls_certificates, keys=arguments.tls_psk, verify_clients=arguments.tls_verify_clients
    )


def _warn_of_strangers(listeners: list[socket.socket], *, writable: bool) -> None:
    """Say on stderr that other machines may connect, and that nobody asks who they are."""
    from tapfs.cli.guard import complain
    from tapfs.nbd.sockets import is_reached_from_outside

    if any(map(is_reached_from_outside, listeners)):
        do = "read and write" if writable else "read"
        complain("tapfs", f"whoever reaches this machine's port may {do} the disk; --tls-psk lets in who has a key")


def _print(uris: list[str]) -> None:
    """One address a line, for whoever waits for it."""
    print_lines(uris)
    sys.stdout.flush()


def _listen(arguments: argparse.Namespace) -> tuple[list[socket.socket], list[str | None]]:
    """Sockets that listen, and for each the path of a Unix socket that is ours to remove."""
    from tapfs.nbd.sockets import Address, listeners_at
    from tapfs.serving.listening import inherited_listeners
    from tapfs.serving.runtime_directory import make_private, runtime_directory
    from tapfs.serving.served_record import records

    listeners = inherited_listeners()
    if listeners:
        if arguments.socket is not None or arguments.tcp:
            raise UsageError("--socket and --tcp do not go with a socket that systemd has opened", _PROGRAM)
        return listeners, [None] * len(listeners)
    path = arguments.socket
    if path is None and not arguments.tcp:
        directory = runtime_directory()
        make_private(directory)
        records()  # and the sockets that killed servers have left there go
        path = str(directory / f"nbd-{os.getpid()}.socket")
    addresses = [*arguments.tcp, *([] if path is None else [Address(os.path.abspath(path))])]
    paths: list[str | None] = []
    try:
        for address in addresses:
            opened = listeners_at(address)
            listeners += opened
            paths += [address.path] * len(opened)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners, paths


def _addresses(
    arguments: argparse.Namespace, export: str, listeners: list[socket.socket], paths: list[str | None]
) -> list[str]:
    """What clients call an export, at each socket."""
    from tapfs.nbd.sockets import uri_of

    secure = arguments.tls_certificates is not None or arguments.tls_psk is not None
    return [uri_of(each, export, path=path, secure=secure) for each, path in zip(listeners, paths, strict=True)]
