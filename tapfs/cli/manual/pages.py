"""The manual pages: one for tapfs, one for each command, one for each program beside it, one for the formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli import blktap_tools, fuse_helper
from tapfs.cli.main import exit_code_table
from tapfs.cli.manual.described import Command, Kind, Word, command_groups, described
from tapfs.cli.manual.formats_page import formats_page
from tapfs.cli.manual.roff import bold, chapter, escaped, italic, prose, tagged, title

if TYPE_CHECKING:
    from collections.abc import Mapping

_ABOUT = """\
tapfs is a toolbox for disk images: it opens, mounts, checks, converts, makes and repairs the images of virtual
machines, and serves their disks to guests, without root wherever the kernel allows it.

An image is a file, a block device, an address such as https://HOST/FILE or nbd://HOST/EXPORT, or ram:NAME for a disk in
shared memory (a file called so: ./ram:NAME). Without -f its contents decide on the format.

A size is a number of bytes or has a unit: K, M, G of 1024, KB, MB, GB of 1000. Options may stand anywhere
before --, which ends them. With --json standard output is one JSON document, also where the command fails."""

_VARIABLES = {
    "TAPFS_PASSWORD": "The password of encrypted images, where no --key-file is given.",
    "TAPFS_SANDBOX": "Set to off, commands run without a sandbox, as with --no-sandbox.",
    "TAPFS_SANDBOX_FOLDERS": "Further folders, with colons between, for disks in use: for swap, mirror and commit.",
    "TAPFS_MERGE_PAGES": "Set to 0, tapfs blktapctrl leaves alone how the kernel merges equal pages (KSM).",
    "TAPFS_UNPACK_LIMIT": "The most that a packed file is unpacked to, such as 4T, or none.",
    "TAPFS_RUNTIME_DIR": "Where processes leave sockets and records for each other (else /run/tapfs for root, \
$XDG_RUNTIME_DIR/tapfs for others).",
    "TMPDIR": "Where scratch files lie (else /var/tmp).",
    "TAPFS_DEBUG": "Set to 1, an internal error shows its traceback.",
}
_GUIDES = """\
The guides, such as docs/mount.md, and examples: beside the folder share/man that has this page. That is \
/usr/share/doc/tapfs of the package of Debian, and a folder of the environment of pip or pipx."""
_FORMATS = ("tapfs-formats", 5)


def manual_pages(*, version: str, date: str) -> Mapping[str, str]:
    """Every page by its file name, as in ``tapfs-convert.1``."""
    groups = command_groups()
    pages = {"tapfs.1": _overview(groups, version=version, date=date)}
    for title_, commands in groups:
        others = [each.name for each in commands]
        for command in commands:
            also = [("tapfs", 1), *((f"tapfs-{name}", 1) for name in others if name != command.name)]
            pages[f"tapfs-{command.name}.1"] = _page(
                f"tapfs-{command.name}", f"tapfs {command.name}", 1, command, also, version=version, date=date
            )
        del title_
    for name, section, command in _programs():
        also = [("tapfs", 1), ("tapfs-mount", 1)] if section == 8 else [("tapfs-create", 1), ("tapfs-convert", 1)]
        pages[f"{name}.{section}"] = _page(name, name, section, command, also, version=version, date=date)
    pages["tapfs-formats.5"] = formats_page(version=version, date=date)
    return pages


def _programs() -> list[tuple[str, int, Command]]:
    helper = described(fuse_helper.parser_of_helper(), "mount.fuse.tapfs", "mount a disk image from /etc/fstab")
    tools = [
        ("qcow-create", blktap_tools.qcow_create_parser(), "make an empty qcow image in blktap's layout"),
        ("img2qcow", blktap_tools.img2qcow_parser(), "copy a raw disk into a qcow image of blktap's layout"),
        ("qcow2raw", blktap_tools.qcow2raw_parser(), "copy the disk of a qcow image into a raw one"),
    ]
    programs = [(name, 1, described(parser, name, summary)) for name, parser, summary in tools]
    return [*programs, ("mount.fuse.tapfs", 8, helper), ("mount.tapfs", 8, helper._replace(name="mount.tapfs"))]


def _overview(groups: list[tuple[str, list[Command]]], *, version: str, date: str) -> str:
    text = title("tapfs", 1, version=version, date=date)
    text += chapter("Name") + "tapfs \\- " + escaped("open, mount, check, convert and repair disk images") + "\n"
    text += chapter("Synopsis") + f"{bold('tapfs')} {italic('COMMAND')} [{italic('ARGUMENT')} ...]\n.br\n"
    text += f"{bold('tapfs help')} [{italic('COMMAND')}]\n.br\n{bold('tapfs')} {bold('--version')}\n"
    text += chapter("Description") + prose(_ABOUT)
    text += chapter("Commands")
    for heading, commands in groups:
        text += f".SS {escaped(heading[0].upper() + heading[1:])}\n"
        text += "".join(tagged(_reference(f"tapfs-{each.name}", 1), escaped(each.summary)) for each in commands)
    text += chapter("Exit status")
    for line in exit_code_table().splitlines()[1:]:
        code, meaning = line.split(maxsplit=1)
        text += tagged(bold(code), escaped(meaning))
    text += chapter("Environment")
    text += "".join(tagged(bold(name), escaped(meaning)) for name, meaning in _VARIABLES.items())
    text += chapter("Files") + tagged(bold("/etc/fstab"), f"See {_reference('mount.tapfs', 8)}.")
    text += tagged(bold("share/doc/tapfs"), escaped(_GUIDES))
    return text + _see_also([_FORMATS, ("mount.tapfs", 8), ("qcow-create", 1), ("img2qcow", 1), ("qcow2raw", 1)])


def _page(
    name: str, typed: str, section: int, command: Command, also: list[tuple[str, int]], *, version: str, date: str
) -> str:
    text = title(name, section, version=version, date=date)
    text += chapter("Name") + f"{escaped(name)} \\- {escaped(command.summary)}\n"
    text += chapter("Synopsis") + _synopsis(typed, command)
    text += chapter("Description") + prose(command.description)
    for heading, words in command.groups:
        text += chapter("Arguments" if heading == "positional arguments" else heading)
        text += "".join(tagged(_tag(word), escaped(word.help)) for word in words)
    takes_options = any(word.kind in (Kind.CREATE_OPTIONS, Kind.AMEND_OPTIONS) for word in command.options)
    if section == 1:
        text += chapter("Exit status") + f"0 where all is well; the codes of errors are in {_reference('tapfs', 1)}.\n"
    has_formats = takes_options or any(word.kind in (Kind.FORMAT, Kind.NEW_FORMAT) for word in command.options)
    return text + _see_also([*also, _FORMATS] if has_formats else also)


def _synopsis(typed: str, command: Command) -> str:
    if command.usage:
        lines = command.usage.removeprefix("usage: ").splitlines()
        return ".nf\n" + "".join(f"{escaped(line.strip())}\n" for line in lines) + ".fi\n"
    operands = [_placeholder(word) for word in command.operands]
    return " ".join([bold(typed), f"[{italic('OPTION')} ...]", *operands]) + "\n"


def _placeholder(word: Word) -> str:
    shown = italic(word.value)
    if word.again:
        return f"[{shown} ...]"
    return f"[{shown}]" if word.optional else shown


def _tag(word: Word) -> str:
    if not word.options:
        return italic(word.value)
    value = "|".join(bold(each) for each in word.choices) if word.choices else italic(word.value)
    tags: list[str] = []
    for option in word.options:
        between = ("=" if option.startswith("--") else " ") if word.value else ""
        shown = f"{between}{value}" if word.value else ""
        tags.append(f"{bold(option)}[{shown}]" if word.optional and word.value else f"{bold(option)}{shown}")
    return ", ".join(tags)


def _reference(name: str, section: int) -> str:
    return f"{bold(name)}({section})"


def _see_also(pages: list[tuple[str, int]]) -> str:
    return chapter("See also") + ",\n".join(_reference(name, section) for name, section in pages) + "\n"
