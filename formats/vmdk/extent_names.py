"""The names under which the file of an extent, or a parent, is looked for: as written, and beside the descriptor.

Disks are moved and renamed, and their descriptors are not: a name from another machine may be absolute, a Windows path
or a path of a datastore (docs/specs/vmdk.md, "Descriptor" and "Delta links"). Whether a name may be opened is decided
by the core.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tapfs.formats.vmdk.text_encoding import literal
from tapfs.patterns import pattern

#: Ends of the names of the files of one disk: parts of a split disk, flat files, delta files.
_ENDING = pattern(r"-(?:[sf][0-9]{3,}|flat|pt|rdmp?|delta|sesparse)\.vmdk$", re.IGNORECASE)
_VMDK = ".vmdk"
#: The datastore of ESX before a name that is in no folder of it: `[datastore1] disk.vmdk`.
_DATASTORE = pattern(r"^\[[^]/\\]+\] *(?=[^/\\])")


def base_name(name: str) -> str:
    """The name without folders, whether they are written with slashes or with backslashes."""
    return re.split(r"[/\\]", name)[-1]


def candidates(name: str, raw_name: bytes, descriptor_path: str) -> Sequence[str]:
    """Names to try in this order, all of one file.

    As the descriptor writes it, as its bytes are, without folders, and as it would be called had it been renamed
    together with the descriptor. A datastore before the name is left out, but not if the descriptor's own name
    begins like that: beside `[copy] disk.vmdk` the file `disk-flat.vmdk` is that of another disk.
    """
    base = base_name(name)
    own = base_name(descriptor_path)
    names = [name, literal(raw_name), base, base_name(literal(raw_name))]
    if _DATASTORE.match(own) is None:
        names.append(_DATASTORE.sub("", base))
    ending = _ENDING.search(base)
    if ending is not None and own.lower().endswith(_VMDK):
        names.append(own[: -len(_VMDK)] + ending[0])
    return list(dict.fromkeys(each for each in names if each and "\0" not in each))


def descriptor_of(path: str) -> str | None:
    """The name that the descriptor of a part of a disk should have; None for a name that is no part's."""
    base = base_name(path)
    ending = _ENDING.search(base)
    return None if ending is None else base[: ending.start()] + _VMDK


def parent_names(hint: str, raw_hint: bytes) -> Sequence[str]:
    """The names to try for a parent, the first as the descriptor writes it."""
    names = [hint, literal(raw_hint), base_name(hint), _DATASTORE.sub("", base_name(hint))]
    return list(dict.fromkeys(each for each in names if each and "\0" not in each))
