"""tapfs-formats(5): the formats, what tapfs can do with each, and the `-o` options, as the drivers say them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.manual.roff import bold, chapter, escaped, italic, prose, tagged, title
from tapfs.disk.probe import aliases_of, format_named, own_format_names, summary_of
from tapfs.driver import Ability, AmendableFormat, CreatableFormat, DescribedFormat, Trait, has_trait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tapfs.driver import Format

_WORDS = {
    Ability.WRITE: "written in place",
    Ability.RESIZE: "resized",
    Ability.CHECK: "checked",
    Ability.REPAIR: "repaired",
    Ability.BACKING: "laid over a parent",
    Ability.SNAPSHOTS: "read at their snapshots",
    Ability.COMPRESS: "compressed",
    Ability.ENCRYPT: "encrypted",
}
_TRAITS = {
    Trait.GUESSED: "A file that no format claims is taken for one of these.",
    Trait.NAMED_TO_WRITE: "The contents do not prove the format, so -f has to name it before an image is written.",
    Trait.ON_DEVICE: "A new image may be a block device.",
    Trait.ALWAYS_ENCRYPTED: "A new image always has a password.",
    Trait.IN_MEMORY: "The images live in shared memory, under the names ram:NAME.",
}
_ABOUT = """\
The formats of disk images that tapfs reads. -f, -O and the other options that take a format take these names. Further
packages can bring formats, which 'tapfs formats' lists, too.

What a file or a stream holds that is packed as a whole by gzip, bzip2, xz or zstd is opened in its place, read-only."""


def formats_page(*, version: str, date: str) -> str:
    """The page."""
    text = title("tapfs-formats", 5, version=version, date=date)
    text += chapter("Name") + "tapfs\\-formats \\- the disk images that tapfs reads and writes\n"
    text += chapter("Description") + prose(_ABOUT)
    text += chapter("Formats")
    for name in own_format_names():
        text += _format(name, format_named(name))
    see = ", ".join(f"{bold(each)}(1)" for each in ("tapfs-formats", "tapfs-create", "tapfs-convert", "tapfs-amend"))
    return f"{text}{chapter('See also')}{see}, {bold('tapfs')}(1)\n"


def _format(name: str, found: Format) -> str:
    text = f".SS {escaped(name)}\n{prose(summary_of(name))}"
    if aliases := aliases_of(name):
        text += f".PP\nAlso called {', '.join(bold(each) for each in aliases)}.\n"
    text += f".PP\n{escaped(_abilities(found))}\n"
    text += "".join(f".PP\n{escaped(said)}\n" for trait, said in _TRAITS.items() if has_trait(found, trait))
    if isinstance(found, CreatableFormat):
        text += _options(f"Options of a new image ({bold('-o')}):", found.create_options)
    if isinstance(found, AmendableFormat):
        text += _options(f"What {bold('tapfs amend')} changes ({bold('-o')}):", found.amend_options)
    return text


def _abilities(found: Format) -> str:
    said = found.abilities if isinstance(found, DescribedFormat) else frozenset[Ability]()
    words = ["read", *(["created"] if isinstance(found, CreatableFormat) else [])]
    words += [word for ability, word in _WORDS.items() if ability in said]
    return f"Images are {', '.join(words[:-1])} and {words[-1]}." if len(words) > 1 else "Images are only read."


def _options(heading: str, options: Mapping[str, str]) -> str:
    if not options:
        return ""
    rows = "".join(tagged(f"{bold(key)}={italic('VALUE')}", escaped(said)) for key, said in options.items())
    return f".PP\n{heading}\n{rows}"
