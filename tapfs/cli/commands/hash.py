"""`tapfs hash`: write a sidecar, by which `tapfs verify` tells later whether a disk still is what it was."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP, add_image_options, open_image
from tapfs.cli.parser import add_rate_option, size_argument
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "hash",
        help="write a sidecar of digests, by which an image is verified later",
        description="Hash what a guest reads from IMAGE, whatever its format, into a sidecar: a hash tree of BLAKE3.\n"
        "'tapfs verify' compares the disk with it later and tells damage from change. The root stands for the whole\n"
        "disk: keep it elsewhere, and a changed sidecar is known, too. Images with the same disk have the same root.\n"
        "docs/verify.md tells more.",
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument(
        "-o",
        "--sidecar",
        metavar="FILE",
        help="the sidecar (IMAGE.tapfs-hash if not given, IMAGE.snapshot-NAME.tapfs-hash of a snapshot)",
    )
    parser.add_argument("--force", action="store_true", help="replace the sidecar if it is there")
    parser.add_argument(
        "--leaf",
        metavar="SIZE",
        type=size_argument,
        help="bytes that have a digest of their own: a power of two from 4K to 1M (64K if not given)",
    )
    add_rate_option(parser, "read")
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Hash, and print the root."""
    from tapfs.disk.sidecar import USUAL_LEAF_BYTES
    from tapfs.jobs.hashing import write_sidecar

    sidecar = sidecar_of(arguments)
    with open_image(arguments) as image, progress_of(arguments, "hash") as progress:
        hashed = write_sidecar(
            image,
            sidecar,
            leaf_bytes=USUAL_LEAF_BYTES if arguments.leaf is None else arguments.leaf,
            overwrite=arguments.force,
            rate=arguments.rate_limit,
            progress=progress,
        )
    if arguments.json:
        print_json(
            {
                "path": arguments.image,
                "sidecar": sidecar,
                "root": hashed.root.hex(),
                "disk_bytes": hashed.disk_bytes,
                "leaf_bytes": hashed.leaf_bytes,
                "leaves": hashed.leaves,
                "sidecar_bytes": os.stat(sidecar).st_size,
            }
        )
    elif not arguments.quiet:
        print_line(f"{hashed.root.hex()}  {arguments.image}")
        leaves = "1 leaf" if hashed.leaves == 1 else f"{hashed.leaves} leaves"
        print_line(f"{sidecar}: {leaves} of {human_size(hashed.leaf_bytes)}")
    return 0


def sidecar_of(arguments: argparse.Namespace) -> str:
    """The sidecar that the arguments name, or the usual one of the image."""
    from tapfs.disk.sidecar import usual_name

    named: str | None = arguments.sidecar
    return usual_name(arguments.image, arguments.snapshot, arguments.disk) if named is None else named
