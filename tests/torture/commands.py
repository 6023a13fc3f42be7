"""Commands whose system calls are failed one at a time: how each is made ready, and what must hold after it.

After each fault: no traceback, an exit code that is documented, a message where it is not 0, a target that is whole or
has no name, an image that checks without corruption, and every byte that was acknowledged.

    python -m tests.torture.commands --only resize-qcow2 --fault pwrite64:error=EIO:when=3
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tapfs
from tapfs.errors import CODES, EXIT_USAGE
from tapfs.testing.model import MemoryFile
from tests.conftest import REPOSITORY
from tests.driver_rows import ROWS
from tests.many_runs import Done, Job, failures
from tests.torture import calls
from tests.torture.calls import Ended, Fault
from tests.torture.served_writer import WRITES

PROGRAM = "python -m tests.torture.commands"
SIZE = 3 << 20
_TAPFS = [sys.executable, "-m", "tapfs.cli"]
CODES_OF_ERRORS = {0} | {codes.exit_code for codes in CODES.values()} - {EXIT_USAGE}


@dataclass(frozen=True)
class Command:
    """What is done to a folder before, the words of the command, and what is looked at after it."""

    prepare: Callable[[Path], None]
    words: Callable[[Path], list[str]]
    look: Callable[[Path, Ended], None]
    #: Exit codes besides those of errors.
    codes: frozenset[int] = frozenset()


def content() -> bytes:
    """The guest's bytes: data, zeros, data."""
    choice = random.Random(15)
    return choice.randbytes(1 << 20) + bytes(1 << 20) + choice.randbytes(1 << 20)


def _disk(path: Path, format_name: str, *parents: str) -> bytes:
    with tapfs.open(path, format=format_name, backing_formats=list(parents)) as disk:
        return disk.read(0, disk.size)


def _sound(path: Path, format_name: str) -> None:
    report = tapfs.check(path, format=format_name)
    assert report.corruptions == 0, report.findings[:4]


# -- create and convert -------------------------------------------------------------------------------------


def _nothing(folder: Path) -> None:
    del folder


def _look_at_new(format_name: str, whole: bytes, folder: Path, ended: Ended) -> None:
    target = folder / "target"
    assert target.exists() or ended.status != 0, "the target is not there"
    if target.exists():
        _sound(target, format_name)
        assert _disk(target, format_name) == whole, "the target is not whole"


def _raw_source(folder: Path) -> None:
    (folder / "source").write_bytes(content())


def _create(format_name: str) -> Command:
    def words(folder: Path) -> list[str]:
        return [*_TAPFS, "create", "-q", "-f", format_name, str(folder / "target"), str(SIZE)]

    return Command(_nothing, words, partial(_look_at_new, format_name, bytes(SIZE)))


def _convert(format_name: str, *options: str) -> Command:
    def words(folder: Path) -> list[str]:
        files = [str(folder / "source"), str(folder / "target")]
        return [*_TAPFS, "convert", "-q", *options, "-f", "raw", "-O", format_name, *files]

    return Command(_raw_source, words, partial(_look_at_new, format_name, content()))


# -- changes in place ---------------------------------------------------------------------------------------


def _image(format_name: str, folder: Path) -> None:
    _raw_source(folder)
    tapfs.convert(folder / "source", folder / "image", format="raw", target_format=format_name)
    (folder / "source").unlink()


def _resize(format_name: str) -> Command:
    def words(folder: Path) -> list[str]:
        return [*_TAPFS, "resize", "-q", "-f", format_name, str(folder / "image"), str(2 * SIZE)]

    def look(folder: Path, ended: Ended) -> None:
        _sound(folder / "image", format_name)
        disk = _disk(folder / "image", format_name)
        assert disk in {content(), content().ljust(2 * SIZE, b"\0")}, "the disk is another one"
        assert ended.status != 0 or len(disk) == 2 * SIZE, "the size is the old one"

    return Command(partial(_image, format_name), words, look)


def _changed(disk: bytes) -> bytes:
    """The disk after the writes of an overlay, or of a mount."""
    changed = bytearray(disk)
    for _, offset, data in WRITES:
        changed[offset : offset + len(data)] = data
    return bytes(changed)


def _commit(format_name: str, base_format: str) -> Command:
    def prepare(folder: Path) -> None:
        _image(base_format, folder)
        tapfs.create(folder / "over", format_name, SIZE, backing=str(folder / "image"), backing_format=base_format)
        with tapfs.open(folder / "over", format=format_name, writable=True, backing_formats=[base_format]) as disk:
            for _, offset, data in WRITES:
                disk.write(offset, data)

    def words(folder: Path) -> list[str]:
        return [*_TAPFS, "commit", "-q", "-f", format_name, "--backing-format", base_format, str(folder / "over")]

    def look(folder: Path, ended: Ended) -> None:
        whole = _changed(content())
        _sound(folder / "over", format_name)
        assert _disk(folder / "over", format_name, base_format) == whole, "the overlay's disk is another one"
        if base_format != "raw":
            _sound(folder / "image", base_format)
        assert ended.status != 0 or _disk(folder / "image", base_format) == whole, "the base has not all of it"

    return Command(prepare, words, look)


def _repair(folder: Path) -> None:
    _image("qcow2", folder)
    file = MemoryFile((folder / "image").read_bytes())
    ROWS["qcow2"].damages["leak"][1](file)
    (folder / "image").write_bytes(file.data)


def _check(folder: Path) -> list[str]:
    return [*_TAPFS, "check", "-r", "all", "-f", "qcow2", str(folder / "image")]


def _look_at_repaired(folder: Path, ended: Ended) -> None:
    report = tapfs.check(folder / "image", format="qcow2")
    assert report.corruptions == 0, report.findings[:4]
    assert ended.status != 0 or report.leaks == 0, "nothing was repaired"
    assert _disk(folder / "image", "qcow2") == content(), "the disk is another one"


# -- disks that are served ----------------------------------------------------------------------------------


def _serving(how: str, format_name: str) -> Command:
    """An image that is mounted, or served by NBD, and written by tests/torture/served_writer.py."""

    def words(folder: Path) -> list[str]:
        return [sys.executable, "-m", "tests.torture.served_writer", how, str(folder), format_name]

    def look(folder: Path, ended: Ended) -> None:
        _sound(folder / "image", format_name)
        disk, old = _disk(folder / "image", format_name), content()
        done = noted.read_text().split() if (noted := folder.parent / "noted").exists() else []
        assert done == ["write", "zero", "end"] or ended.status != 0, (
            f"only {done} was acknowledged, and nobody said so"
        )
        for name, start, new in WRITES:
            end = start + len(new)
            if name in done:
                assert disk[start:end] == new, f"the {name} that was acknowledged is lost"
            else:
                among = all(
                    byte in {was, now} for byte, was, now in zip(disk[start:end], old[start:end], new, strict=True)
                )
                assert among, f"the {name} left what was never there"
            old = old[:start] + disk[start:end] + old[end:]
        assert disk == old, "the disk changed beside what was written"

    return Command(partial(_image, format_name), words, look, frozenset({1}))


COMMANDS: dict[str, Command] = {
    **{f"create-{name}": _create(name) for name in ("qcow2", "vhdx", "vmdk")},
    **{f"convert-{name}": _convert(name) for name in ("raw", "qcow2", "vhd", "vmdk", "vdi", "vhdx", "qcow")},
    "convert-compressed": _convert("qcow2", "-c"),
    **{f"resize-{name}": _resize(name) for name in ("qcow2", "vhdx", "vdi")},
    "commit-qcow2": _commit("qcow2", "raw"),
    "commit-vmdk": _commit("vmdk", "vmdk"),
    "repair": Command(_repair, _check, _look_at_repaired, frozenset({2, 3})),
    **{f"mount-{name}": _serving("mount", name) for name in ("qcow2", "vhd")},
    "serve-qcow2": _serving("serve", "qcow2"),
}


def known_faults(name: str, folder: Path) -> list[Fault]:
    """All that a call of the command on its files can have, found by a run without any."""
    command, files = COMMANDS[name], folder / "files"
    files.mkdir()
    command.prepare(files)
    ended, found = calls.faults(command.words(files), files, folder / "log")
    assert ended.status == 0, ended.output
    command.look(files, ended)
    shutil.rmtree(files)
    return found


def judge(name: str, fault: Fault, folder: Path) -> Done:
    """Run the command with a fault. Raises AssertionError."""
    command, files = COMMANDS[name], folder / "files"
    files.mkdir()
    command.prepare(files)
    ended = calls.run_with(fault, command.words(files), files, folder / "log")
    try:
        if ended.met:  # else Python itself may have met it, while it loads modules
            assert f'File "{REPOSITORY}/tapfs/' not in ended.output, "there is a traceback"
            assert ended.status in CODES_OF_ERRORS | command.codes, f"exit code {ended.status}"
            assert ended.status in {0} | command.codes or ended.output.strip(), "an error without a message"
        command.look(files, ended)
    except (AssertionError, tapfs.ImageError) as error:
        error.add_note(f"status {ended.status}: {ended.output[-3000:]}")
        raise
    if not ended.met:
        return Done("the call did not come", {"calls that did not come": 1})
    return Done(f"status {ended.status}", {"system calls failed": 1})


def jobs(names: Iterable[str], folder: Path, share: float, choice: random.Random) -> Iterator[Job]:
    """A run for each fault of each command, in any order; `share` of them, drawn at random."""
    found: list[tuple[str, Fault]] = []
    for name in names:
        place = folder / name
        place.mkdir()
        found += [(name, fault) for fault in known_faults(name, place)]
        shutil.rmtree(place)
    choice.shuffle(found)
    for name, fault in found[: max(1, int(len(found) * share))]:
        yield Job(f"{name} {fault}", f"{PROGRAM} --only {name} --fault {fault}", partial(judge, name, fault))


def main(words: list[str]) -> int:
    """Run commands with one fault, with all, or with some of them."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="COMMAND", choices=COMMANDS, nargs="+", default=list(COMMANDS))
    parser.add_argument("--fault", metavar="CALL:error=NAME:when=N", help="only this one")
    parser.add_argument("--share", metavar="X", type=float, default=1.0, help="of all faults, drawn at random")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--processes", metavar="N", type=int, default=1)
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="tapfs-calls-") as folder:
        if arguments.fault is None:
            chosen = jobs(arguments.only, Path(folder), arguments.share, random.Random(arguments.seed))
            return failures(chosen, arguments.processes)
        call, error, number = arguments.fault.split(":")
        fault = Fault(call, int(number.removeprefix("when=")), error.removeprefix("error="))
        sys.stdout.write(f"{judge(arguments.only[0], fault, Path(folder)).said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
