"""The options that say what a new image is like: for create, convert and measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.options import new_password
from tapfs.cli.parser import UsageError, format_argument, parse_options, size_argument
from tapfs.cli.reporting import print_line
from tapfs.cli.sizes import sizes_in_options
from tapfs.errors import ErrorKind, ImageError
from tapfs.records import replace

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from tapfs.jobs.create import NewImage


def add_target_options(parser: argparse.ArgumentParser, prefix: str = "", *, secret: bool = True) -> None:
    """Add -b, -F, -o, --encrypt and the file with the password for it, the last one only with a `secret`.

    `prefix` keeps the long names apart from those of :func:`tapfs.cli.options.add_image_options`.
    """
    group = parser.add_argument_group("what the new image is like")
    # qemu-img's -B is the backing file of convert up to 10.0, and the format of that of create from 11.0 on.
    group.add_argument(
        *(["-b", "-B"] if prefix else ["-b"]),
        f"--{prefix}backing",
        dest="target_backing",
        metavar="FILE",
        help="its parent; written into the image as given, so a relative name starts at the image's folder",
    )
    group.add_argument(
        *(["-F"] if prefix else ["-F", "-B"]),
        f"--{prefix}backing-format",
        dest="target_backing_format",
        metavar="FMT",
        type=format_argument,
        help="format of the parent",
    )
    group.add_argument(
        "-o",
        dest="options",
        metavar="KEY=VALUE,...",
        action="append",
        default=[],
        help="options of the format; '-o help' lists them",
    )
    group.add_argument("--encrypt", action="store_true", help="encrypt it")
    if not secret:
        return
    group.add_argument(
        f"--{prefix}key-file",
        dest="target_key_file",
        metavar="FILE",
        help="the first line of FILE is its password (else the --key-file, $TAPFS_PASSWORD or a prompt)"
        if prefix
        else "the first line of FILE is its password (else $TAPFS_PASSWORD, else a prompt)",
    )


def wants_help(arguments: argparse.Namespace) -> bool:
    """Whether `-o help` was given."""
    return any(text in ("help", "?") for text in arguments.options)


def wants_encryption(arguments: argparse.Namespace, format_name: str) -> bool:
    """Whether the new image has a password: by --encrypt, by an option of encryption, or because its format is so."""
    from tapfs.disk.probe import format_named
    from tapfs.driver import Trait, has_trait

    if arguments.encrypt or has_trait(format_named(format_name), Trait.ALWAYS_ENCRYPTED):
        return True
    return any(pair.strip().startswith("encrypt.") for text in arguments.options for pair in text.split(","))


def print_options(format_name: str) -> int:
    """What `-o` takes for a format."""
    from tapfs.disk.probe import format_named
    from tapfs.driver import CreatableFormat

    found = format_named(format_name)
    if not isinstance(found, CreatableFormat):
        raise ImageError(ErrorKind.UNSUPPORTED, f"tapfs does not make {format_name} images", op="create")
    return print_options_of(format_name, found.create_options)


def print_options_of(format_name: str, options: Mapping[str, str]) -> int:
    """Options of a format with what each says."""
    if not options:
        print_line(f"{format_name} has no options.")
        return 0
    width = max(len(name) for name in options) + 2
    for name, meaning in options.items():
        print_line(f"{name:<{width}}{meaning}")
    return 0


def add_sparse_size_option(parser: argparse.ArgumentParser, *, zero: str) -> None:
    """Add -S for commands that look for zeros; `zero` says what a SIZE of 0 does."""
    parser.add_argument(
        "-S",
        "--sparse-size",
        metavar="SIZE",
        type=size_argument,
        help=f"look for zeros in pieces of SIZE (4K if not given); 0: {zero}",
    )


def check_copied(arguments: argparse.Namespace, sources: list[str], program: str) -> None:
    """Raise UsageError for options of a copy of `sources` into a new image that do not go together."""
    if len(sources) > 1 and arguments.target_backing:
        raise UsageError("-b goes with one SOURCE: several make a disk that no backing file has", program)
    if arguments.sparse_size is not None and (arguments.compress or arguments.target_backing):
        raise UsageError("-S goes with neither -c nor -b, which look at whole clusters", program)


def default_format(path: str, option: str) -> str:
    """The format of a new image where `option` names none: as qemu-img raw, or what `ram:NAME` says.

    A remark says so where the file is called after another format.
    """
    from tapfs.cli.guard import complain
    from tapfs.disk.probe import format_names
    from tapfs.host.ram import FORMAT, is_ram

    if is_ram(path):
        return FORMAT
    suffix = path.rpartition(".")[2].lower()
    if suffix in format_names() and suffix not in ("raw", "ram"):
        complain("tapfs", f"{path} becomes a raw image; {option} {suffix} makes a {suffix} image")
    return "raw"


def new_image_of(
    arguments: argparse.Namespace,
    path: str,
    *,
    format_name: str,
    size: int | None,
    key_file: str | Sequence[str] | None,
    program: str,
) -> NewImage:
    """What the options ask for; asks for a password if it is to be encrypted and none is given."""
    new = plain_new_image_of(arguments, format_name=format_name, size=size, program=program)
    return replace(new, password=new_password(key_file, path)) if wants_encryption(arguments, format_name) else new


def plain_new_image_of(arguments: argparse.Namespace, *, format_name: str, size: int | None, program: str) -> NewImage:
    """What the options ask for, but for a password."""
    from tapfs.jobs.create import NewImage

    take_backing_options(arguments, program)
    return NewImage(
        format=format_name,
        size=size,
        backing=arguments.target_backing,
        backing_format=arguments.target_backing_format,
        options=format_options(arguments.options, program),
    )


def take_backing_options(arguments: argparse.Namespace, program: str) -> None:
    """Take `backing_file` and `backing_fmt` out of the -o pairs, where qemu-img has them, too."""
    kept: list[str] = []
    for pair in (piece for text in arguments.options for piece in text.split(",")):
        key, _, value = pair.partition("=")
        if key not in ("backing_file", "backing_fmt"):
            kept.append(pair)
            continue
        place = "target_backing" if key == "backing_file" else "target_backing_format"
        if getattr(arguments, place) is not None:
            raise UsageError(
                f"-o {key} and {'-b' if key == 'backing_file' else '-F'} say the same thing twice", program
            )
        setattr(arguments, place, value if key == "backing_file" else format_argument(value))
    arguments.options = [",".join(kept)] if kept else []


def format_options(pairs: list[str], program: str) -> dict[str, str]:
    """The `-o` pairs; a size such as 64K becomes the number of bytes, which is what drivers take."""
    options = parse_options(pairs, program)
    try:
        return sizes_in_options(options)
    except ValueError as error:
        raise UsageError(f"-o {','.join(pairs)}: {error}", program) from None
