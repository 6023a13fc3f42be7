"""`tapfs survey`: every image under folders, object stores and pools, and which of them need which."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tapfs.cli.many_options import add_many_options, runner_of
from tapfs.cli.parser import UsageError
from tapfs.cli.reporting import add_json_option, add_progress_options, count_of, print_columns, print_line, progress_of
from tapfs.cli.sizes import human_size
from tapfs.disk.password import PASSWORD_VARIABLE

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.many.image_row import Row
    from tapfs.many.survey import Survey, Wanted

_PROGRAM = "tapfs survey"

#: The exit code where something could not be listed or read.
EXIT_NOT_ALL = 1

#: Seconds that one image may take: where it is looked at, and where all of it is read.
_LOOK_SECONDS, _READ_SECONDS = 60, 3600

#: Images that go to a worker process in one message, where they are only looked at.
_TOGETHER = 64

#: Digits of a hash that the table shows.
_DIGITS = 16


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "survey",
        help="list every image under folders, object stores and Ceph pools",
        description="Look at every image under each PATH and say what it is, what it needs and what needs it.\n"
        "PATH: a folder, an image, a prefix of an object store (s3://BUCKET/PREFIX/, gs://, az://), a Ceph pool\n"
        "(rbd:POOL). Nothing is mounted or written, and images in use are read without their users' leave.\n"
        "Of a package (.ova, .ovf, .vmx, .vbox, .xva, .box) each disk is an image.\n"
        "An image that cannot be read costs its row an error, and a hang ends after --timeout.\n"
        "Files that are no image are counted. Exit code: 0, 1 if something could not be listed or read.",
    )
    parser.add_argument("paths", metavar="PATH", nargs="*", help="where images are looked for")
    parser.add_argument("--hash", action="store_true", help="with the hash of each disk, as blksum computes it")
    parser.add_argument("--check", action="store_true", help="with a check of each image's metadata")
    parser.add_argument("--content", action="store_true", help="with the partitions and file systems on each disk")
    parser.add_argument(
        "--key-file",
        metavar="[IMAGE=]FILE",
        action="append",
        help="the first line of FILE is the password of encrypted images, for --hash and --content"
        f" (else ${PASSWORD_VARIABLE}, else they are left out); IMAGE=FILE gives one image its own; may be given again",
    )
    parser.add_argument("--all", action="store_true", help="take a file that shows nothing for a raw image, too")
    parser.add_argument(
        "-o", dest="output", metavar="FILE", help="write the survey into FILE: .jsonl, .sqlite or .parquet"
    )
    parser.add_argument(
        "--to",
        choices=["table", "jsonl", "sqlite", "parquet"],
        help="how it is written (default: as FILE is called; without -o a table on a terminal, else JSON lines)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take over from FILE, and from a survey that was interrupted, what has not changed since",
    )
    group = parser.add_argument_group("what an image may cost")
    add_many_options(group.add_argument, timeout=f"{_LOOK_SECONDS}, with --hash or --check {_READ_SECONDS}")
    parser.add_argument(
        "--no-backing", action="store_true", help="open no file because an image names it, so no parents either"
    )
    parser.add_argument(
        "--backing-root",
        metavar="DIR",
        action="append",
        help="refuse parents, and other files that an image names, outside DIR; may be given again",
    )
    parser.add_argument(
        "--no-sandbox", action="store_true", help="look at the images with all rights of the user (docs/sandbox.md)"
    )
    add_json_option(parser)
    add_progress_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the survey and write it."""
    kind = _kind_of(arguments)
    from tapfs.many import survey_files
    from tapfs.many.survey import HANDLER, make_survey

    wanted = _wanted(arguments)
    output: str | None = arguments.output
    seconds = _READ_SECONDS if {"hash", "check"} & set(wanted.asked) else _LOOK_SECONDS
    with ExitStack() as stack:
        known: dict[str, list[Row]] = {}
        journal = None
        if output is not None:
            known = survey_files.known_rows(output, kind) if arguments.resume else {}
            journal = stack.enter_context(survey_files.Journal(output, resume=arguments.resume))
        together = _TOGETHER if seconds == _LOOK_SECONDS else 1
        runner = stack.enter_context(
            runner_of(arguments, HANDLER, timeout_seconds=seconds, together=together, program=_PROGRAM)
        )
        with progress_of(arguments, "survey", unit="files") as progress:
            survey = make_survey(
                arguments.paths,
                wanted,
                runner,
                known=known,
                note=None if journal is None else journal.note,
                progress=progress,
            )
        if output is not None:
            survey_files.write_survey(output, kind, survey.rows)
    _show(arguments, kind, survey)
    failed = survey.unlisted or any(row["error"] is not None for row in survey.rows)
    return EXIT_NOT_ALL if failed else 0


def _kind_of(arguments: argparse.Namespace) -> str:
    """How the survey is written. Raises UsageError for options that do not go together."""
    from tapfs.many.survey_files import KINDS

    if not arguments.paths:
        raise UsageError("PATH is missing", _PROGRAM)
    if arguments.backing_root is not None and arguments.no_backing:
        raise UsageError("--no-backing opens no parents, so it does not go with --backing-root", _PROGRAM)
    if arguments.output is None:
        if arguments.resume:
            raise UsageError("--resume goes with -o: the survey that is gone on with is in FILE", _PROGRAM)
        if arguments.to in ("sqlite", "parquet"):
            raise UsageError(f"--to {arguments.to} goes with -o FILE", _PROGRAM)
        return arguments.to or ("table" if sys.stdout.isatty() else "jsonl")
    if arguments.to == "table":
        raise UsageError("a table goes to standard output, without -o", _PROGRAM)
    kind: str | None = arguments.to or KINDS.get(os.path.splitext(arguments.output)[1].lower())
    if kind is None:
        raise UsageError("-o FILE ends in .jsonl, .sqlite or .parquet, or --to says how it is written", _PROGRAM)
    return kind


def _wanted(arguments: argparse.Namespace) -> Wanted:
    from tapfs.many.image_row import PARTS
    from tapfs.many.survey import Wanted

    asked = tuple(part for part in PARTS if getattr(arguments, part))
    roots = () if arguments.no_backing else arguments.backing_root
    sandboxed = not arguments.no_sandbox
    from tapfs.disk.password import absolute_key_file, given_password

    key_files: list[str] = arguments.key_file or []
    given_password(key_files)  # a file that cannot be read is found out now, and not by each image
    keys = tuple(absolute_key_file(name) for name in key_files)
    return Wanted(asked, arguments.all, None if roots is None else tuple(roots), sandboxed, keys)


def _show(arguments: argparse.Namespace, kind: str, survey: Survey) -> None:
    from tapfs.cli.guard import complain
    from tapfs.errors import printable

    for place in survey.unlisted:
        complain("tapfs", f"{printable(place.path)}: not listed: {place.message}")
    if arguments.json:
        from tapfs.cli.json_output import print_json

        print_json(
            {
                "images": survey.rows,
                "not_images": survey.not_images,
                "parts": survey.parts,
                "reused": survey.reused,
                "unlisted": [{"path": each.path, "message": each.message} for each in survey.unlisted],
            }
        )
        return
    if arguments.output is None and kind == "jsonl":
        from tapfs.cli.json_output import print_json_lines
        from tapfs.many.survey_files import json_line

        print_json_lines(map(json_line, survey.rows))
        return
    if arguments.output is None:
        _print_table(survey.rows, arguments)
    if not arguments.quiet:
        print_line(_summary(survey))


def _print_table(rows: list[Row], arguments: argparse.Namespace) -> None:
    """One line for each image; of one that could not be read the error below."""
    if not rows:
        return
    titles = ["format", "virtual", "on host", "health", "needs", "used by"]
    titles += ["contents"] if arguments.content else []
    titles += ["hash"] if arguments.hash else []
    lines = [("image", *titles)]
    for row in rows:
        cells = [_format_of(row), _size(row["virtual_size"]), _size(row["allocated_size"]), _health_of(row)]
        needed = sum(not _is_inside(part["path"], row["path"]) for part in row["chain"])
        cells += [str(needed or "-"), str(len(row["used_by"]) or "-")]
        cells += [_contents_of(row)] if arguments.content else []
        cells += [(row["hash"] or "-")[:_DIGITS]] if arguments.hash else []
        lines.append((_name_of(row), *cells))
    print_columns(lines)
    for row in rows:
        if row["error"] is not None:
            print_line(f"{_name_of(row)}: {row['error']['message']}")
        for part in row["chain"]:
            if part["state"] in ("missing", "refused"):
                print_line(f"{_name_of(row)}: its parent {part['path']} is {part['state']}")


def _name_of(row: Row) -> str:
    """The words by which a command is given the image."""
    return row["path"] if row["disk"] is None else f"{row['path']} --disk {row['disk']}"


def _is_inside(path: str, file: str) -> bool:
    """Whether a name is that of the file, or of a member of the archive that the file is."""
    return path == file or path.startswith(f"{file}/")


def _format_of(row: Row) -> str:
    package = "" if row["package"] is None else f" in {row['package']}"
    packed = "" if row["packed"] is None else f" in {row['packed']}"
    return f"{row['format']}{package}{packed}{', encrypted' if row['encrypted'] else ''}"


def _health_of(row: Row) -> str:
    if row["health"] == "not checked":
        return "in use" if row["in_use"] else "-"
    return row["health"]


def _contents_of(row: Row) -> str:
    contents = row["contents"]
    if contents is None:
        return "-"
    whole = contents["file_system"]
    found = [whole["type"]] if whole is not None else []
    for each in contents["partitions"]["table"]:
        inner = each["file_system"]
        found += [f"{each['number']}:{inner['type']}"] if inner is not None else []
    scheme = contents["partitions"]["scheme"]
    return " ".join([scheme, *found] if scheme else found) or "nothing known"


def _size(size: int | None) -> str:
    return "-" if size is None else human_size(size)


def _summary(survey: Survey) -> str:
    facts = [count_of(len(survey.rows), "image")]
    chains = sum(1 for row in survey.rows if row["chain"] and not row["used_by"])
    facts += [f"in {count_of(chains, 'chain')}"] if chains != len(survey.rows) and chains else []
    if failed := sum(row["error"] is not None for row in survey.rows):
        facts.append(f"{failed} that could not be read")
    if survey.reused:
        facts.append(f"{survey.reused} as before")
    if survey.parts:
        facts.append(f"{count_of(survey.parts, 'file')} that others are made of")
    if survey.not_images:
        facts.append(f"{count_of(survey.not_images, 'file')} that {'is' if survey.not_images == 1 else 'are'} no image")
    total = sum({row["path"]: row["allocated_size"] or 0 for row in survey.rows}.values())
    return f"{', '.join(facts)}; {human_size(total)} on the host"
