"""The mount options of `tapfs mount -o` and of fstab lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.parser import UsageError, parse_options
from tapfs.errors import spelled

if TYPE_CHECKING:
    from tapfs.fuse.settings import MountSettings

#: The options that `-o` takes, each with the kind of its value.
_FLAGS = ("allow_other", "suid", "dev", "noexec", "nonempty")
_NUMBERS = {"uid": 10, "gid": 10, "umask": 8}

#: Options of the kernel's file system whose files are shown, passed on as they are. True: they take a value.
_INNER = {"discard": False, "errors": True}

#: Options that only mounts of files take.
_OF_FILES = {"suid", "dev", *_INNER}

_ACCESS = ("ro", "rw")

#: Options of `tapfs mount` that an fstab line may have, by their names there. True: they take a value.
_LONG = {
    "any_parent": False,
    "as": True,
    "parent_folder": True,
    "backing": True,
    "backing_format": True,
    "backing_root": True,
    "cache": True,
    "direct": False,
    "disk": True,
    "engine": True,
    "files": False,
    "force_share": False,
    "format": True,
    "key_file": True,
    "no_sandbox": False,
    "overlay": True,
    "partition": True,
    "remote_cache": True,
    "remote_cache_size": True,
    "sector_size": True,
    "sidecar": True,
    "snapshot": True,
    "temp": False,
    "verify_reads": False,
    "write_base": False,
}

#: Generic options: they are for mount(8), systemd and the like, or are true of every mount of ours.
_GENERIC = {
    *("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "fail", "nofail", "_netdev"),
    *("exec", "nosuid", "nodev", "async", "sync", "dirsync", "atime", "noatime", "diratime", "nodiratime"),
    *("relatime", "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime", "iversion", "noiversion"),
    *("mand", "nomand", "silent", "loud", "subtype", "fsname", "comment"),
    # Of FUSE: the first is always so, the others have no effect in this kernel or on this disk.
    *("default_permissions", "big_writes", "max_read", "blksize", "user_id", "group_id", "rootmode"),
}

_REMOUNT = "remount"


def options_of_mounts() -> dict[str, bool]:
    """The options that `tapfs mount -o` takes, each with whether it takes a value."""
    return dict.fromkeys((*_ACCESS, *_FLAGS), False) | dict.fromkeys(_NUMBERS, True) | _INNER


def settings_of(texts: list[str], program: str, *, files: bool) -> MountSettings:
    """What `-o` options say of a mount of the disk or of the files in there. Raises UsageError."""
    from tapfs.fuse.settings import MountSettings

    flags: set[str] = set()
    inner: list[str] = []
    numbers: dict[str, int] = {}
    for name, value in parse_options(texts, program).items():
        if name in _FLAGS and value == "on":
            flags.add(name)
        elif name in _NUMBERS:
            numbers[name] = _number(name, value, program)
        elif name in _INNER and _INNER[name] != (value == "on"):
            inner.append(f"{name}={value}" if _INNER[name] else name)
        elif not (name in _GENERIC or (name in _ACCESS and value == "on")):
            known = ", ".join([*_ACCESS, *_FLAGS, *(f"{each}=" for each in _NUMBERS), "discard", "errors="])
            raise UsageError(f"no such mount option: {name!r} (there are {known})", program)
    for_files = sorted((flags | {each.partition("=")[0] for each in inner}) & _OF_FILES)
    if for_files and not files:
        raise UsageError(f"{for_files[0]} is for {spelled('{files}')}: it is about the file system inside", program)
    return MountSettings(
        allow_other="allow_other" in flags,
        uid=numbers.get("uid"),
        gid=numbers.get("gid"),
        umask=numbers.get("umask"),
        flags=frozenset(flags - {"allow_other"}),
        inner=tuple(inner),
    )


def wants_writing(texts: list[str], program: str, *, ro: bool, rw: bool, scratch: bool) -> bool:
    """Whether the image is to be writable: by --ro, by --rw, or by the last `ro` or `rw` among the `-o` options.

    `scratch`: the disk is written into an overlay. Raises UsageError where these contradict each other.
    """
    said = [piece for text in texts for piece in text.split(",") if piece in _ACCESS][-1:]
    if (ro and said == ["rw"]) or (rw and said == ["ro"]):
        raise UsageError(f"--{'ro' if ro else 'rw'} and -o {said[0]} contradict each other", program)
    if scratch and (ro or said == ["ro"]):
        raise UsageError(spelled("{overlay=FILE} and {temp} let the disk be written; leave out ro"), program)
    return rw or said == ["rw"]


def wants_remount(options: str) -> bool:
    """Whether the options of an fstab line ask for a change of a mount that is there."""
    return _REMOUNT in options.split(",")


def last_access(options: str) -> bool:
    """Whether the last of `ro` and `rw` among the options is `rw`, which is the default of mount(8)."""
    return [each for each in options.split(",") if each in _ACCESS][-1:] != ["ro"]


def words_for(options: str, program: str) -> list[str]:
    """The words of `tapfs mount` for the options of an fstab line. Raises UsageError."""
    words: list[str] = []
    passed_on: list[str] = []
    writable = False
    for option in filter(None, options.split(",")):
        name, equals, value = option.partition("=")
        if option in _ACCESS:
            writable = option == "rw"  # the last one counts
        elif name in _LONG:
            if _LONG[name] != bool(equals):
                raise UsageError(f"{name} {'needs a' if _LONG[name] else 'takes no'} value", program)
            words.append("--" + name.replace("_", "-") + (f"={value}" if equals else ""))
        elif name in _FLAGS or name in _NUMBERS or name in _INNER:
            passed_on.append(option)
        elif name not in _GENERIC and not name.startswith(("x-", "X-")):
            raise UsageError(f"no such mount option: {option!r}", program)
    return [*words, *(["--rw"] if writable else []), *(["-o", ",".join(passed_on)] if passed_on else [])]


def _number(name: str, text: str, program: str) -> int:
    try:
        number = int(text, _NUMBERS[name])
    except ValueError:
        number = -1
    most = 0o777 if name == "umask" else 0xFFFFFFFE
    if not 0 <= number <= most:
        raise UsageError(f"{name}={text}: not {'an octal number up to 777' if name == 'umask' else 'an ID'}", program)
    return number
