"""Mutate the drivers, the write path or the engine, one place at a time, and see whether the fitting tests notice.

    python -m tests.torture.mutation vdi --sample 20 --seed 1 --processes 2

A mutant is the tree with one change: a comparison, an operator, a constant, a condition turned round, or a statement
left out. Where no test fails the mutant has survived, and its place is printed. Mutants are drawn at random. The exit
status is 0: a survivor is to be judged by a person.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.conftest import REPOSITORY
from tests.many_runs import Done, Job, run_all
from tests.torture import c_mutants

#: A mutant whose tests take longer has been noticed: it goes round in circles.
_PATIENCE_SECONDS = 900
_COMPARED: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
_CALCULATED: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "//",
    ast.FloorDiv: "*",
    ast.Mod: "//",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.LShift: ">>",
    ast.RShift: "<<",
}


class Target(NamedTuple):
    """What is mutated, by patterns of paths, and the words for Python that test it."""

    files: tuple[str, ...]
    tests: tuple[tuple[str, ...], ...]


class Mutant(NamedTuple):
    """One change of a file: the bytes from `start` to `end` become others."""

    path: str
    line: int
    start: int
    end: int
    new: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.start}-{self.end}={self.new or 'nothing'}"


def _kit(name: str) -> tuple[str, ...]:
    return (*_unit("tests/crash/test_driver_plans.py", "tests/property/test_drivers.py"), "-k", f"{name}-")


def _resize(name: str) -> tuple[str, ...]:
    return ("-m", "tapfs.testing", name, "--suite", "resize", "--seeds", "3")


def _unit(*paths: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths)


#: Files of the engine that write, or say in which order. tests/torture/c_mutants.py changes them.
_ORDERING = "write layer_write reserved plan guard clone written segments map_change"
#: Tests of theirs that take a second or two: most mutants need no others.
_WRITES = "write write_segments write_nowait written patch holes direct marking concurrency"

#: Files of the drivers that say what a flush writes, and in which order: plans, reservations, refcounts, journals.
_ORDERS = {
    "qcow": "qcow/writer",
    "qcow2": "qcow2/writer qcow2/refcounts qcow2/refcount_blocks qcow2/space qcow2/guard qcow2/edited_image",
    "vdi": "vdi/writer blocks/writer",
    "vhd": "vhd/writer",
    "vhdx": "vhdx/writer vhdx/log_ring vhdx/log_entry vhdx/log_scan vhdx/recovery vhdx/pages vhdx/space",
    "vmdk": "vmdk/writer vmdk/extent_writer vmdk/grain_tables vmdk/new_extents",
}


def _driver(name: str, files: tuple[str, ...]) -> Target:
    tests = [_unit(f"tests/unit/formats/{name}"), _kit(name), _resize(name)]
    tests.append(_unit("tests/crash/test_rebase_plans.py"))
    if name.startswith("qcow"):  # what a commit adds to a plan log is theirs
        tests.append(_unit("tests/crash/test_plan_log.py"))
    return Target(files, tuple(tests))


TARGETS: dict[str, Target] = {
    **{name: _driver(name, (f"formats/{name}/*.py",)) for name in _ORDERS},
    **{
        f"{name}-orders": _driver(name, tuple(f"formats/{file}.py" for file in files.split()))
        for name, files in _ORDERS.items()
    },
    "write_path": Target(
        ("tapfs/disk/write_path.py", "tapfs/disk/write_claims.py", "tapfs/disk/plan_log.py", "tapfs/disk/recovery.py"),
        (
            _unit("tests/unit/disk", "tests/crash/test_plan_log.py"),
            ("-m", "tests.faults", "--what", "operations", "one-by-one", "--only", "overlay", "qcow2", "--seeds", "1"),
        ),
    ),
    "engine": Target(
        tuple(f"kernel/src/engine/{name}.c" for name in _ORDERING.split()),
        (
            _unit(*(f"tests/unit/engine/test_{name}.py" for name in _WRITES.split())),
            (*_unit("tests/unit/disk", "tests/property/test_image_model.py"), "-m", "not native"),
            ("-m", "tests.faults", "--what", "operations", "one-by-one", "--only", "overlay", "qcow2", "--seeds", "1"),
            (*_unit("tests/unit/jobs", "tests/crash", "tests/unit/engine"), "-m", "not native"),
        ),
    ),
    "mover": Target(
        ("kernel/src/mover/*.c",),
        (_unit("tests/unit/engine/test_mover.py", "tests/unit/fuse/test_data.py", "tests/unit/nbd/test_requests.py"),),
    ),
}


def mutants(target: Target) -> list[Mutant]:
    """All of a target, in the order of its files."""
    found: list[Mutant] = []
    for pattern in target.files:
        for path in sorted(REPOSITORY.glob(pattern)):
            found += [mutant for mutant in of_file(path) if _is_program(mutant)]
    return found


def _is_program(mutant: Mutant) -> bool:
    """Whether a file of Python is still one."""
    if mutant.path.endswith(".c"):
        return True
    try:
        ast.parse(mutated((REPOSITORY / mutant.path).read_bytes(), mutant))
    except SyntaxError:
        return False
    return True


def mutated(source: bytes, mutant: Mutant) -> bytes:
    """The file with the mutant."""
    return source[: mutant.start] + mutant.new.encode() + source[mutant.end :]


def of_file(path: Path) -> Iterator[Mutant]:
    source = path.read_bytes()
    if path.suffix == ".c":
        for change in c_mutants.changes(source.decode("ascii")):
            yield _mutant(path, source, *change)
        return
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def begin(node: ast.expr | ast.stmt) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr | ast.stmt) -> int:
        return starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare(left, [op], [right]) if type(op) in _COMPARED:
                yield _mutant(path, source, end(left), begin(right), f" {_COMPARED[type(op)]} ")
            case ast.BinOp(left, op, right) if type(op) in _CALCULATED and not _is_text(left, right):
                # Brackets around an operand would be lost.
                if not {*b"()"} & {*source[end(left) : begin(right)]}:
                    yield _mutant(path, source, end(left), begin(right), f" {_CALCULATED[type(op)]} ")
            case ast.Constant(int(value)) if not isinstance(node.value, bool):
                yield _mutant(path, source, begin(node), end(node), str(value + 1))
            case ast.If(test) | ast.While(test) | ast.IfExp(test):
                inner = source[begin(test) : end(test)].decode()
                if "\n" not in inner and ":=" not in inner:
                    yield _mutant(path, source, begin(test), end(test), f"(not ({inner}))")
            case ast.Expr(ast.Call()) | ast.AugAssign():
                yield _mutant(path, source, begin(node), end(node), "pass")
            case _:
                pass


def _is_text(*nodes: ast.expr) -> bool:
    return any(isinstance(node, ast.JoinedStr | ast.Constant) and not _is_number(node) for node in nodes)


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def _mutant(path: Path, source: bytes, start: int, end: int, new: str) -> Mutant:
    return Mutant(os.path.relpath(path, REPOSITORY), source.count(b"\n", 0, start) + 1, start, end, new)


def judge(mutant: Mutant, target: Target, folder: Path) -> Done:
    """Run the tests on a tree with the mutant."""
    for name in ("formats", "kernel", "tapfs", "tests", "scripts", "fixtures"):
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, folder)
    changed = folder / mutant.path
    source = changed.read_bytes()
    changed.write_bytes(mutated(source, mutant))
    old = source[mutant.start : mutant.end].decode().strip()
    if changed.suffix == ".c" and not c_mutants.build(mutant.path, folder):
        return Done("no program", {"mutants that are no program": 1})
    environment = os.environ | {"PYTHONPATH": str(folder), "TMPDIR": str(folder)}
    for words in target.tests:
        try:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=folder,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
                timeout=_PATIENCE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Done("noticed: it takes too long", {"mutants noticed": 1})
        if done.returncode != 0:
            return Done(f"noticed by {words[1]}", {"mutants noticed": 1})
    return Done(f"SURVIVED: {old!r} became {mutant.new.strip()!r}", {"mutants that survived": 1})


def jobs(names: list[str], sample: int, choice: random.Random) -> Iterator[Job]:
    """Mutants of the targets, `sample` of each."""
    for name in names:
        found = mutants(TARGETS[name])
        for mutant in choice.sample(found, min(sample, len(found))):
            yield Job(f"{name}, one of {len(found)}: {mutant}", str(mutant), partial(judge, mutant, TARGETS[name]))


def main(words: list[str]) -> int:
    """Draw mutants and judge them."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", choices=TARGETS, nargs="+")
    parser.add_argument("--sample", metavar="N", type=int, default=10, help="of each target (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--processes", metavar="N", type=int, default=1)
    parser.add_argument("--seconds", metavar="S", type=float, help="begin none later")
    arguments = parser.parse_args(words)
    chosen = list(jobs(arguments.target, arguments.sample, random.Random(arguments.seed)))
    random.Random(arguments.seed).shuffle(chosen)
    tally = run_all(chosen, arguments.processes, arguments.seconds)
    sys.stdout.write(f"{tally.runs} mutants: {dict(tally.counts)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
