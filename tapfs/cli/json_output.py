"""JSON on standard output. It notes whether a document has begun, which an error must not spoil."""

from __future__ import annotations

import sys

#: Type checkers take this name for true. Its owner, `typing`, takes longer to load than Ctrl-C to come.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: Whether a part of a document has been printed: of one that is printed piece by piece. The guard resets it.
begun = False


def print_json(value: Mapping[str, object] | Sequence[Mapping[str, object]]) -> None:
    """One JSON document on standard output: an object, or a list of them. docs/json must describe every key."""
    from tapfs.disk.json_text import json_text  # only those who want it pay for it

    print(json_text(value))


def print_json_lines(lines: Iterable[str]) -> None:
    """JSON lines, each of which `json.dumps` has made."""
    sys.stdout.writelines(f"{line}\n" for line in lines)


def begin_document() -> None:
    """A document comes piece by piece. Should an error cut it short, no second document follows."""
    global begun  # noqa: PLW0603 - standard output is one for the process
    begun = True


def wants_json(words: list[str]) -> bool:
    """Whether a command line asks for JSON, also where it is wrong otherwise."""
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options or "--output=json" in options or " --output json " in f" {' '.join(options)} "
