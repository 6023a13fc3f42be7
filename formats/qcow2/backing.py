"""The name of a qcow2 image's parent: a file's name, or the JSON description of a file that QEMU writes.

A relative name starts at the folder of the overlay, whatever its form. QEMU takes the process's own folder for the
names in ``json:``, so the same image means different files to it; tapfs does not follow it there. A description with an
option that may show other bytes than those of the file (a part of it, another parent of it) is not followed either.
"""

from __future__ import annotations

from typing import cast

from tapfs.driver import BackingReference

#: Formats that QEMU calls otherwise in a header.
_QEMU_WORDS = {"vhd": "vpc"}

_JSON = "json:"
#: Drivers of QEMU whose node is a file or a device of the host.
_FILE_DRIVERS = {"file", "host_device"}
#: Options of a node of QEMU that change how its bytes are read and cached, and none of the bytes.
_OF_ANY_NODE = {
    "driver", "node-name", "read-only", "auto-read-only", "force-share", "discard", "detect-zeroes",
    "cache.direct", "cache.no-flush", "cache.writeback",
}  # fmt: skip
#: The same of the file or device at the bottom.
_OF_A_FILE = _OF_ANY_NODE | {"filename", "aio", "aio-max-batch", "locking", "pr-manager", "drop-cache"}
#: The same of a format above it; those of overlap checks begin as `_OVERLAPS`.
_OF_A_FORMAT = _OF_ANY_NODE | {
    "lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "discard-no-unref",
    "cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval",
    "encrypt.format", "encrypt.key-secret",
}  # fmt: skip
_OVERLAPS, _FILE = "overlap-check", "file."


def backing_reference(name: str, format_name: str | None) -> BackingReference:
    """What the header's name and its format extension say of the parent."""
    if not name.startswith(_JSON):
        return BackingReference(name, format_name)
    described = _described(name.removeprefix(_JSON))
    if described is None:
        return BackingReference(name, format_name)  # the core says that it is no local file
    path, driver = described
    # A name from JSON is a file's name, whatever it looks like.
    return BackingReference(path if path.startswith(("/", "./", "../")) else f"./{path}", format_name or driver)


def format_word(format_name: str) -> str:
    """A format as QEMU writes it into a header."""
    return _QEMU_WORDS.get(format_name, format_name)


def _described(text: str) -> tuple[str, str | None] | None:
    """The file's name and the format in a JSON description, where it describes a plain file."""
    import json  # few names need it

    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(options, dict):
        return None
    flat = _flat(cast("dict[str, object]", options))
    if "file.filename" in flat:
        driver, path = flat.get("driver"), flat["file.filename"]
        protocol = flat.get("file.driver", "file")
    else:
        driver, path, protocol = None, flat.get("filename"), flat.get("driver", "file")
    if not isinstance(path, str) or not path or "\0" in path or protocol not in _FILE_DRIVERS:
        return None
    if not all(map(_shows_all, flat) if "file.filename" in flat else (key in _OF_A_FILE for key in flat)):
        return None
    return path.removeprefix("file:"), driver if isinstance(driver, str) else None


def _shows_all(option: str) -> bool:
    """Whether an option leaves the disk as it is: it names no part of the file, and no other parent or data file."""
    if option.startswith(_FILE):
        return option.removeprefix(_FILE) in _OF_A_FILE
    return option in _OF_A_FORMAT or option.startswith(_OVERLAPS)


def _flat(options: dict[str, object], prefix: str = "", depth: int = 0) -> dict[str, object]:
    """Nested options by their dotted names, as QEMU flattens them."""
    flat: dict[str, object] = {}
    for key, value in options.items():
        if isinstance(value, dict) and depth < 2:
            flat |= _flat(cast("dict[str, object]", value), f"{prefix}{key}.", depth + 1)
        else:
            flat[f"{prefix}{key}"] = value
    return flat
