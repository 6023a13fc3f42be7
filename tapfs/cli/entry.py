"""The programs that are installed. Each holds back Ctrl-C and the like before it imports anything else.

A command takes a moment to load. Without this an interruption in that moment would end in a traceback. The guard around
the command (tapfs/cli/guard.py) lets the signals through.
"""


def tapfs() -> int:
    """`tapfs`."""
    _hold_signals()
    from tapfs.cli.main import main

    return main()


def qcow_create() -> int:
    """`qcow-create`."""
    _hold_signals()
    from tapfs.cli.blktap_tools import qcow_create

    return qcow_create()


def img2qcow() -> int:
    """`img2qcow`."""
    _hold_signals()
    from tapfs.cli.blktap_tools import img2qcow

    return img2qcow()


def qcow2raw() -> int:
    """`qcow2raw`."""
    _hold_signals()
    from tapfs.cli.blktap_tools import qcow2raw

    return qcow2raw()


def mount_fuse_tapfs() -> int:
    """`mount.fuse.tapfs`."""
    _hold_signals()
    from tapfs.cli.fuse_helper import main

    return main()


def _hold_signals() -> None:
    # `signal` is made of this module, and itself takes a tenth of the time that is to be bridged.
    signals = __import__("_signal")
    signals.pthread_sigmask(signals.SIG_BLOCK, (signals.SIGINT, signals.SIGTERM, signals.SIGHUP))
