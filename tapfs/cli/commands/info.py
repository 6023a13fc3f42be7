"""`tapfs info`: what an image is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

from tapfs.cli.json_output import begin_document, print_json
from tapfs.cli.options import (
    IMAGE_HELP,
    add_image_options,
    add_no_backing_option,
    add_sector_size_option,
    chain_was_opened,
    open_options,
    warn_of_noise,
)
from tapfs.cli.reporting import add_json_option, count_of, print_table
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from tapfs.cli.parser import Subparsers
    from tapfs.disk.package import PackageInfo
    from tapfs.driver import Driver

_SIZES = {"virtual_size", "file_size", "allocated_size", "granule", "cluster_size", "granularity"}


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "info",
        help="show format, sizes, parents and partitions of an image",
        description="Show format, sizes, parents, partitions and file systems of IMAGE.\n"
        "Of an encrypted image without its password, and of one whose parent is missing, all but what is on the disk.\n"
        "Of a package (.ova, .ovf, .vmx, .vbox, .xva, .box) its disks; --disk N shows one of them.\n"
        "Use --no-backing for an image from a stranger: its header can name any file as its parent.",
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("-v", "--verbose", action="store_true", help="show how the format stores it, too")
    parser.add_argument(
        "--backing-chain", action="store_true", help="the same of each parent, nearest first; with --json a list"
    )
    add_sector_size_option(parser)
    add_no_backing_option(parser)
    add_json_option(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it; needs no password. A parent that is refused is an error, but not before the image's own facts."""
    from tapfs.disk.inspection import inspect
    from tapfs.disk.password import given_password

    password = given_password(arguments.key_file)
    options = open_options(arguments)
    if options.disk is None and not options.overlaid:
        from tapfs.disk.package import describe_package, package_of

        with package_of(arguments.image, options) as opened:
            if opened is not None:
                return _show_package(describe_package(opened, options), as_json=arguments.json)
    with inspect(arguments.image, options, password=password) as found:
        chain_was_opened(found.image)
        if found.unopened is None:
            warn_of_noise(found.image)
        described = found.infos(sector_size=arguments.sector_size)
        shown = [_plain_details(layer.driver) for layer in found.image.layers]
    if arguments.json:
        begin_document()  # a refusal that follows is in there, and is no document of its own
        print_json(described if arguments.backing_chain else described[0])
    else:
        for number, (info, details) in enumerate(zip(described, shown, strict=True)):
            if number and not arguments.backing_chain:
                break
            if number:
                print()
            print_table(info_rows(info, None if arguments.verbose else details))
    found.raise_refusal()
    return 0


def _show_package(package: PackageInfo, *, as_json: bool) -> int:
    """Print the disks of a package."""
    if as_json:
        print_json(package)
        return 0
    print_table(_package_rows(package))
    return 0


def _package_rows(package: PackageInfo) -> Iterator[tuple[str, str]]:
    yield "path", package["path"]
    yield "package", package["package"]
    label = "disks"
    for disk in package["disks"]:
        size = disk["virtual_size"]
        facts = [disk["name"], disk["format"] or "", "" if size is None else human_size(size)]
        yield label, f"{disk['number']}: {', '.join(fact for fact in facts if fact)}"
        if disk["error"] is not None:
            yield "", f"   cannot be opened: {disk['error']}"
        label = ""
    for note in package["notes"]:
        yield "note", note


def _plain_details(driver: Driver) -> frozenset[str]:
    from tapfs.driver import PlainDetails

    plain: frozenset[str] = driver.plain_details if isinstance(driver, PlainDetails) else frozenset()
    return plain | {"notes"}


def info_rows(info: Mapping[str, object], details: frozenset[str] | None) -> Iterator[tuple[str, str]]:
    """The rows of one image, with these of the format's details; None: with all that there is."""
    for key, value in info.items():
        if key == "granule" and details is not None:
            continue
        if key == "files" and len(cast("Sequence[str]", value)) == 1:
            continue  # it is the path
        if key == "details":
            for name, detail in cast("Mapping[str, object]", value).items():
                if name not in info and (details is None or name in details):
                    yield from _row(name, detail)
        elif key == "backing":
            if value is not None:
                backing = cast("Mapping[str, object]", value)
                known = "" if backing["format"] is None else f" ({backing['format']})"
                yield "backing", f"{backing['name']}{known}"
        elif key == "chain":
            links = cast("Sequence[Mapping[str, object]]", value)
            for depth, link in enumerate(links if len(links) > 1 else ()):
                yield "chain" if depth == 0 else "", f"{depth}: {link['path']} ({_link(link)})"
        elif key == "file_system":
            if value is not None:
                yield "file system", _file_system(cast("Mapping[str, str | None]", value))
        elif key == "partitions":
            yield from _partition_rows(cast("Mapping[str, object]", value))
        else:
            yield from _row(key, value)


def _link(link: Mapping[str, object]) -> str:
    parts = [
        link["format"],
        link["state"] if link["virtual_size"] is None else human_size(cast("int", link["virtual_size"])),
    ]
    return ", ".join(str(part) for part in parts if part is not None)


def _partition_rows(partitions: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    if partitions["scheme"] is not None:
        yield "partitions", f"{partitions['scheme']}, sectors of {partitions['sector_size']} bytes"
    for partition in cast("Sequence[Mapping[str, object]]", partitions["table"]):
        place = f"{human_size(cast('int', partition['size']))} at {human_size(cast('int', partition['start']))}"
        parts = [place, str(partition["type_name"] or partition["type"])]
        if partition["name"] is not None:
            parts.append(str(partition["name"]))
        if partition["bootable"]:
            parts.append("bootable")
        if partition["file_system"] is not None:
            parts.append(_file_system(cast("Mapping[str, str | None]", partition["file_system"])))
        yield "", f"{partition['number']}: {', '.join(parts)}"
    for note in cast("Sequence[str]", partitions["notes"]):
        yield "note", note


def _file_system(found: Mapping[str, str | None]) -> str:
    label = "" if found["label"] is None else f" {found['label']!r}"
    return f"{found['type']}{label}" + ("" if found["uuid"] is None else f" ({found['uuid']})")


def _row(key: str, value: object) -> Iterator[tuple[str, str]]:
    label = key.replace("_", " ")
    if value is None:
        return
    if key in _SIZES and isinstance(value, int):
        yield label, f"{human_size(value)} ({value} bytes)" if value >= 1024 else count_of(value, "byte")
    elif isinstance(value, list):
        for item in cast("list[object]", value):
            yield label, _record(cast("dict[str, object]", item)) if isinstance(item, dict) else _text(item)
            label = ""
    else:
        yield label, _text(value)


def _record(item: Mapping[str, object]) -> str:
    """A snapshot, a bitmap and the like, by its name or else its id: what it is, and what it is not."""
    facts: list[str] = []
    title = "name" if item.get("name") else "id"
    for key, value in item.items():
        words = key.replace("_", " ")
        if key in (title, "name") or value is None:
            continue
        if isinstance(value, bool):
            facts.append(words if value else f"not {words}")
        elif key == "seconds" and isinstance(value, int):
            facts.append(f"made {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(value))}")
        elif isinstance(value, int) and (key in _SIZES or key.endswith("_bytes")):
            facts += [f"{words} {human_size(value)}"] if value else []
        else:
            facts.append(f"{words} {_text(value)}")
    return f"{item[title]}: {', '.join(facts)}" if title in item else ", ".join(facts)


def _text(value: object) -> str:
    if isinstance(value, dict):
        parts = cast("dict[str, object]", value).items()
        return ", ".join(f"{name.replace('_', ' ')} {_text(part)}" for name, part in parts if part is not None)
    if isinstance(value, list):
        return "; ".join(_text(part) for part in cast("list[object]", value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
