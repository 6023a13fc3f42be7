"""The sandbox of this process: what it needs is said first, and may become less, never more.

A process that opens a chain enters the sandbox before it looks at an image, and reads what its gate lets images name.
When the chain is open, or before code of another package sees the image, that becomes the folders of the chain. What
the kernel does not have is left out and said in the log, once. There is one sandbox in a process, and all threads that
are started after `enter` are in it.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.sandbox import calls, capabilities, rules
from tapfs.host.sandbox.filter import Calls, install
from tapfs.records import NamedTuple

#: "off" in this variable is as good as `--no-sandbox`, for those who embed tapfs and for its tests.
VARIABLE = "TAPFS_SANDBOX"

#: Every process may read these: the system's programs and libraries, its tables that are no secrets, itself.
SYSTEM = (
    *("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/proc", "/sys"),
    *(
        "/etc/ld.so.cache",
        "/etc/ld.so.conf",
        "/etc/ld.so.conf.d",
        "/etc/localtime",
        "/etc/timezone",
        "/etc/locale.alias",
    ),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/os-release", "/etc/ssl/openssl.cnf", "/etc/gnutls"),
    *("/etc/alternatives", "/etc/mtab", "/nix/store", "/gnu/store"),
)
#: Processes that talk to other machines read these, too.
_NETWORK = (
    *("/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf"),
    *("/etc/services", "/etc/protocols", "/etc/gai.conf", "/etc/ceph", "/run/systemd/resolve"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")

#: Folders that hold much besides an image.
_COMMON = frozenset({"/", "/dev", "/etc", "/root", "/home", "/run", "/var"})

#: Bytes of memory that belong to a process alone, and are not its caches.
DATA_BYTES = 4 << 30


class Needs(NamedTuple):
    """What a process needs of its host. Paths that do not exist are left out.

    `read`: files, and folders with all that is below. `write`: files and devices that are written in place. `make`:
    folders in which files are made, exchanged and removed; `opening_makes`: until the chain is open. `remove`: folders
    in which files are removed. `anything`: rights (`rules`) that are not limited yet,
    because the chain says where its files lie. `chains`: so many are opened, and the last one ends that; 0: nothing
    does. `scratch`: unnamed files in $TMPDIR or /var/tmp, after the opening only with `keeps_scratch`. `cache_bytes`:
    caches, which come on top of the limit of memory; None: no limit is set. `capabilities`: of root, what it keeps.
    `fetched`: addresses that may be fetched, by processes that another one outside starts (`remote.starter`); `shown`:
    those that may be written, which such a process shows as files.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    make: tuple[str, ...] = ()
    opening_makes: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    anything: int = 0
    chains: int = 0
    scratch: bool = False
    keeps_scratch: bool = False
    signals: bool = False
    calls: Calls = Calls()
    cache_bytes: int | None = 0
    capabilities: frozenset[int] = capabilities.FILES_OF_OTHERS
    fetched: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


class _State:
    def __init__(self) -> None:
        self.needs: Needs | None = None
        #: What the kernel did not do.
        self.missing: tuple[str, ...] = ()


_state = _State()


def is_switched_off() -> bool:
    """Whether the environment says that there is to be no sandbox."""
    return os.environ.get(VARIABLE, "").lower() in ("off", "0", "no")


def is_entered() -> bool:
    """Whether this process is in its sandbox."""
    return _state.needs is not None


def description() -> str:
    """How `tapfs list` and info.json tell of the sandbox: "on", "off", or what is missing of it."""
    if _state.needs is None:
        return "off"
    return f"on, without {', '.join(_state.missing)}" if _state.missing else "on"


def enter(needs: Needs) -> None:
    """Give up all that is not needed. Only this thread and those that it starts are in the sandbox: be the only one.

    Nothing is done where the environment says so, or where the process is in it already.
    """
    if is_switched_off() or is_entered():
        return
    _limit(needs)
    kept = capabilities.keep_only(needs.capabilities)
    missing = [] if kept else ["capabilities"]
    if not calls.forbid_new_privileges():
        missing.append("no_new_privs")
    _restrict(needs)
    missing += rules.missing()
    if not install(needs.calls):
        missing.append("system calls")
    _state.needs, _state.missing = needs, tuple(missing)
    _say_missing(missing)


def narrow(needs: Needs) -> None:
    """Give up more, once it is known what is needed. Nothing that was given up comes back. In the thread of `enter`."""
    if not is_entered() or needs == _state.needs:
        return
    _restrict(needs)
    before = _state.needs
    if before is not None and before.calls != needs.calls:
        install(needs.calls)  # the kernel asks both filters
    _state.needs = needs


def needed() -> Needs | None:
    """What the process has said that it needs; None outside of the sandbox."""
    return _state.needs


def chain_is_open(files: Iterable[tuple[str, bool]]) -> None:
    """A chain has been opened; its files, by where they lie, and whether each is written. The last one narrows."""
    needs = _state.needs
    if needs is None or needs.chains == 0:
        return
    found = list(files)
    needs = needs._replace(
        chains=needs.chains - 1,
        read=(*needs.read, *(place for path, _ in found for place in read_with(path))),
        write=(*needs.write, *(path for path, written in found if written)),
    )
    if needs.chains == 0:
        left = needs._replace(anything=0, opening_makes=())
        narrow(left._replace(scratch=needs.scratch and needs.keeps_scratch))
    else:
        _state.needs = needs


def end_start() -> None:
    """A process that serves has been started; it makes none itself, and reads what lies beside its image no more."""
    needs = _state.needs
    if needs is not None:
        narrow(needs._replace(anything=0, calls=needs.calls._replace(forks=False)))


def before_code_of_others(path: str) -> None:
    """A driver of another package is about to see the image: it reads what was named, and beside the image."""
    needs = _state.needs
    if needs is not None and needs.anything:
        narrow(needs._replace(anything=0, read=(*needs.read, *read_with(path))))


def folder_of(path: str) -> str:
    """The folder in which the file lies that the path means."""
    return os.path.dirname(os.path.realpath(path))


def read_with(path: str) -> tuple[str, ...]:
    """What is read with an image: its folder, for the files beside it that it names, unless much else lies there."""
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    return (real,) if folder in _COMMON or folder.startswith("/dev/") else (real, folder)


def explained(error: ImageError, path: str) -> ImageError:
    """The error of a file that could not be opened, or be made in the folder `path`, if the sandbox is the reason."""
    # access(2) asks for what the user may do, and knows nothing of the sandbox.
    if error.kind is ErrorKind.DENIED and is_entered() and os.access(path, os.R_OK):
        error.message = "lies outside of what the sandbox of this process allows it"
        error.remedy = (
            "if you trust the image with it, allow its folder by {backing_root=DIR}, and for a"
            " disk in use by TAPFS_SANDBOX_FOLDERS=DIR in the environment of its process, or say {no_sandbox}"
        )
    return error


def _restrict(needs: Needs) -> None:
    """Have the kernel hold the rules. Raises ImageError where it has them and something is lacking, as descriptors."""
    try:
        rules.restrict(_rules(needs), unlimited=needs.anything, network=needs.calls.network, signals=needs.signals)
    except OSError as error:
        raise from_os_error(error, path=None, op="enter the sandbox") from error


def _rules(needs: Needs) -> Iterable[rules.Rule]:
    programs = rules.EXECUTE if needs.calls.programs else 0
    for path in (*SYSTEM, *_of_python()):
        yield rules.Rule(path, rules.READING | programs)
    if needs.calls.network:
        for path in _NETWORK:
            yield rules.Rule(path, rules.READING)
    for path in _DEVICES:
        yield rules.Rule(path, rules.READ_FILE | rules.WRITE_FILE | rules.IOCTL_DEV)
    for path in needs.read:
        yield rules.Rule(path, rules.READING | rules.IOCTL_DEV)
    for path in needs.write:
        yield rules.Rule(path, rules.WRITING)
    for path in needs.remove:
        yield rules.Rule(path, rules.REMOVE_FILE)
    for path in (*needs.make, *needs.opening_makes):
        yield rules.Rule(path, rules.MAKING)
    if needs.scratch:
        from tapfs.host.scratch import scratch_folder

        yield rules.Rule(scratch_folder(), rules.MAKING | rules.REMOVE_DIR)


@cache
def _of_python() -> tuple[str, ...]:
    """The folders of the interpreter and of what it imports."""
    # A driver of the source tree is behind a symbolic link.
    own = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    links = [os.path.join(own, name) for name in ("formats", "kernel")]
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix}
    return tuple({*prefixes, own, *links, *(entry for entry in sys.path if entry and os.path.isabs(entry))})


def _limit(needs: Needs) -> None:
    # A core file would hold what is on the disk, and the key of an encrypted image.
    _lower(resource.RLIMIT_CORE, 0)
    if needs.cache_bytes is not None:
        # The address space is no measure: maps of files count there. Processes are counted for the whole user, so their
        # limit is none of ours: the filter refuses to make any.
        _lower(resource.RLIMIT_DATA, DATA_BYTES + 2 * needs.cache_bytes)
        if not needs.calls.listens:  # a server takes what its clients need
            _lower(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _lower(what: int, value: int) -> None:
    soft, hard = resource.getrlimit(what)
    with suppress(ValueError, OSError):
        lowest = min(value, *(each for each in (soft, hard) if each != resource.RLIM_INFINITY), value)
        resource.setrlimit(what, (lowest, lowest))


def _say_missing(missing: list[str]) -> None:
    if missing:
        import logging  # where nothing is missing nobody needs it

        logging.getLogger("tapfs").info("the sandbox is without %s: this kernel does not have it", ", ".join(missing))
