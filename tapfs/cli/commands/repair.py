"""`tapfs repair`: mend the metadata of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.commands.check import checked, show
from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP, add_image_options, open_options
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line
from tapfs.errors import EXIT_NOT_CHECKED
from tapfs.plan import Allocate, Copy, Discard, Grow, Plan, Shorten, Step, Write

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "repair",
        help="mend the metadata of an image",
        description="Mend what can be mended in the metadata of IMAGE without losing guest data, then check it again.\n"
        "Interrupted at any point, it leaves an image that reads as before or better.\n"
        "The backing file is not part of it. Exit code: 0 clean now, 2 still corrupt, 3 leaked space left,\n"
        "63 nothing was checked (raw images have no metadata); others: 'tapfs --help'.",
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("-n", "--dry-run", action="store_true", help="change nothing, show what would be done")
    parser.add_argument(
        "--drop-bitmaps",
        action="store_true",
        help="give up bitmaps that cannot be true (qcow2: QEMU opens no image with such); each is named, and the next\n"
        "backup by it has to be a full one",
    )
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Repair and report, or show the plan."""
    if arguments.dry_run:
        return _show(arguments)
    report = checked(arguments, repair="all", drop_bitmaps=arguments.drop_bitmaps)
    sound = report.checked and not (report.mended or report.corruptions or report.leaks)
    if sound and not (arguments.json or arguments.quiet):
        print_line(f"{arguments.image}: nothing to repair")
    return show(arguments, report)


def _show(arguments: argparse.Namespace) -> int:
    from tapfs.jobs.check import plan_repair

    plans, unchecked = plan_repair(arguments.image, open_options(arguments), drop_bitmaps=arguments.drop_bitmaps)
    code = 0 if unchecked is None else EXIT_NOT_CHECKED
    if arguments.json:
        print_json(
            {
                "path": arguments.image,
                "checked": unchecked is None,
                "unchecked": unchecked,
                "stages": [list(map(_as_json, stage)) for stage in _stages(plans)],
                "mends": _mends(plans),
            }
        )
        return code
    if unchecked is not None:
        print_line(f"{arguments.image}: nothing was checked: {unchecked}")
    elif not any(plans):
        print_line(f"{arguments.image}: nothing to repair")
    for fault in _mends(plans):
        print_line(f"would mend: {fault}")
    for number, stage in enumerate(_stages(plans), start=1):
        for step in stage:
            print_line(f"stage {number}: {_as_text(step)}")
    return code


def _mends(plans: list[Plan]) -> list[str]:
    return [plan.mends for plan in plans if plan.mends]


def _stages(plans: list[Plan]) -> list[tuple[Step, ...]]:
    return [stage for plan in plans for stage in plan.stages]


def _as_json(step: Step) -> dict[str, object]:
    match step:
        case Write():
            return {"step": "write", "host_offset": step.host_offset, "length": len(step.data)}
        case Grow():
            return {"step": "grow", "size": step.size}
        case Discard():
            return {"step": "discard", "host_offset": step.host_offset, "length": step.length}
        case Allocate():
            return {"step": "allocate", "host_offset": step.host_offset, "length": step.length}
        case Copy():
            return {"step": "copy", "host_offset": step.host_offset, "source": step.source, "length": step.length}
        case Shorten():
            return {"step": "shorten", "size": step.size}


def _as_text(step: Step) -> str:
    match step:
        case Write():
            return f"write {len(step.data)} bytes at byte {step.host_offset:#x}"
        case Grow():
            return f"make the file at least {step.size} bytes long"
        case Discard():
            return f"free {step.length} bytes at byte {step.host_offset:#x}"
        case Allocate():
            return f"take space for {step.length} bytes at byte {step.host_offset:#x}"
        case Copy():
            return f"copy {step.length} bytes from byte {step.source:#x} to byte {step.host_offset:#x}"
        case Shorten():
            return f"cut the file off at byte {step.size:#x}"
