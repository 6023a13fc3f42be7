"""The programs that are installed. Each holds back Ctrl-C and the like before it imports anything else.

A command takes a moment to load. Without this an interruption in that moment would end in a traceback. The guard around
the command (tapfs/cli/guard.py) lets the signals through.

A command that is done leaves its process at once: everything is closed and flushed by then, and to take the interpreter
apart takes as long as a fifth of a short command.
"""

import gc
import os
import sys

#: So many objects more than before are made until the collector looks through them; Python's own number is 700. The
#: largest of the commands loads 26,000.
_YOUNG_OBJECTS = 40_000


def tapfs() -> int:
    """`tapfs`."""
    _begin()
    from tapfs.cli.main import main

    return _leave(main())


def qcow_create() -> int:
    """`qcow-create`."""
    _begin()
    from tapfs.cli.blktap_tools import qcow_create

    return _leave(qcow_create())


def img2qcow() -> int:
    """`img2qcow`."""
    _begin()
    from tapfs.cli.blktap_tools import img2qcow

    return _leave(img2qcow())


def qcow2raw() -> int:
    """`qcow2raw`."""
    _begin()
    from tapfs.cli.blktap_tools import qcow2raw

    return _leave(qcow2raw())


def mount_fuse_tapfs() -> int:
    """`mount.fuse.tapfs`."""
    _begin()
    from tapfs.cli.fuse_helper import main

    return _leave(main())


def _begin() -> None:
    # What a command loads stays: the collector would look through all of it a dozen times, and find nothing.
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
    # `signal` is made of this module, and itself takes a tenth of the time that is to be bridged.
    signals = __import__("_signal")
    signals.pthread_sigmask(signals.SIG_BLOCK, (signals.SIGINT, signals.SIGTERM, signals.SIGHUP))
    from tapfs.cli import quick_import

    quick_import.install()


def _leave(code: int) -> int:
    """End the process with this exit code. It is returned where threads are left that Python waits for."""
    threading = sys.modules.get("threading")
    if threading is not None and any(
        not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()
    ):
        return code
    if (at_exit := sys.modules.get("atexit")) is not None:
        at_exit._run_exitfuncs()  # noqa: SLF001  nothing public runs them before os._exit
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105  contextlib would be loaded for it
            stream.flush()
        except (OSError, ValueError, AttributeError):  # the guard has said so, or there is no such stream
            pass
    os._exit(code)
