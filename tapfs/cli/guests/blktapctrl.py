"""`tapfs blktapctrl`: the supervisor that serves the disks of a Xen host's guests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.reporting import print_line

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Serve the disks of this host's guests: those of 'tapfs attach', and those of xl with
'script=block-tapfs'. It stays in the foreground and starts a process for each disk; one that crashes
is started again, and the guest sees a pause. SIGTERM and SIGINT end it and all disk processes in good
order; guests wait until it runs again. If it is killed, the disks go on, and the next one takes
them over. One runs on a host, usually as a service:
  tapfs blktapctrl --install && systemctl enable --now tapfs-blktapctrl"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("blktapctrl", help="serve the disks of Xen guests", description=_DESCRIPTION)
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    parser.add_argument(
        "--install",
        metavar="ROOT",
        nargs="?",
        const="/",
        help="serve nothing, but install the systemd unit and xl's block script (below ROOT, for packagers)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    if arguments.install is not None:
        from tapfs.xen.supervisor.install import install

        for path in install(arguments.install):
            print_line(str(path))
        return 0
    from tapfs.xen.host import find_host

    host = find_host()
    import logging

    from tapfs.serving.log import log_to_stderr
    from tapfs.xen.runtime_files import directory
    from tapfs.xen.supervisor.supervisor import supervise
    from tapfs.xen.supervisor.supervisor_lock import take_supervisor_lock

    log_to_stderr()
    if arguments.verbose:
        logging.getLogger().setLevel(logging.DEBUG)
    take_supervisor_lock()  # until this process ends, however it does
    supervise(host, directory())
    return 0
