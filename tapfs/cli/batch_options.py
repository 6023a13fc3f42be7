"""The options of commands that take a list of images."""

from __future__ import annotations

import argparse

from tapfs.cli.many_options import add_many_options
from tapfs.cli.parser import UsageError


def add_batch_options(parser: argparse.ArgumentParser, *, line: str) -> None:
    """Add --batch and what goes with it; `line` says what a line of the list is."""
    group = parser.add_argument_group("many images")
    group.add_argument(
        "--batch",
        metavar="LIST",
        help=f"do it for each line of LIST (-: standard input): {line}, or JSON; docs/batch.md",
    )
    group.add_argument(
        "--journal",
        metavar="FILE",
        help="with --batch: note in FILE what is done, and leave that out when it is said again (default: LIST.done)",
    )
    add_many_options(group.add_argument, timeout="24 hours")


def refuse_batch_options(arguments: argparse.Namespace, program: str) -> None:
    """Raise UsageError for an option that goes with --batch only."""
    for name in ("journal", "jobs", "timeout", "memory", "scheduler"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} goes with --batch", program)
