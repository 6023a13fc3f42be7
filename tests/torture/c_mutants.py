"""Mutants of the engine's C: the places of a file that are changed, and an engine that is built with one of them."""

from __future__ import annotations

import fcntl
import hashlib
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tapfs.kernel import build_engine
from tests.conftest import REPOSITORY

_SOURCES = REPOSITORY / "kernel/src"
_FLAGS = [*build_engine.FLAGS, "-O1", "-w", "-fPIC", f"-I{_SOURCES}", f"-I{sysconfig.get_path('include')}"]


class Change(NamedTuple):
    """The bytes from `start` to `end` become others."""

    start: int
    end: int
    new: str


_COMPARED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_CALCULATED = {"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "&": "|", "|": "&", "<<": ">>", ">>": "<<"}
_JOINED = {"&&": "||", "||": "&&", "+=": "-=", "-=": "+=", "|=": "&="}
_OPERATOR = re.compile(r" (<=|>=|==|!=|<<|>>|&&|\|\||\+=|-=|\|=|[<>+*/%&|-]) ")
_NUMBER = re.compile(r"(?<![\w.])(\d+)(?=u?\b)(?![\w.]*x)")
_CONDITION = re.compile(r"^ *(?:\} else )?if \((?P<test>[^{}]*)\) \{$", re.MULTILINE)
#: A call whose result nobody takes, or a store, alone on its line. A declaration has a type before the name.
_STATEMENT = re.compile(
    r"^ +(?P<all>(?:[\w.>*&-]|\[[^]]*\])+(?:\(.*\)| (?:=|\+=|-=|\|=|&=) [^;]*|\+\+|--);)$", re.MULTILINE
)
_NOT_PROGRAM = re.compile(
    r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|^#[^\n]*', re.DOTALL | re.MULTILINE
)


def changes(source: str) -> Iterator[Change]:
    """All that one place of a file can become: another comparison, number, operator or condition, or no statement."""
    text = _NOT_PROGRAM.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)
    for match in _OPERATOR.finditer(text):
        new = (_COMPARED | _CALCULATED | _JOINED).get(match[1])
        if new is not None:
            yield Change(match.start(1), match.end(1), new)
    for match in _NUMBER.finditer(text):
        yield Change(match.start(1), match.end(1), str(int(match[1]) + 1))
    for match in _CONDITION.finditer(text):
        yield Change(match.start("test"), match.end("test"), f"!({source[match.start('test') : match.end('test')]})")
    for match in _STATEMENT.finditer(text):
        if not match["all"].startswith(("return", "goto")):
            yield Change(match.start("all"), match.end("all"), ";")


def build(path: str, tree: Path) -> bool:
    """Have a copy of the repository, in which this file is another one, use an engine of it; False: it is no C."""
    ready, name = _objects(), Path(path).relative_to("kernel/src").with_suffix(".o")
    made = tree / "changed.o"
    words = ["gcc", *_FLAGS, "-c", "-o", made, tree / path]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        return False
    others = [each for each in sorted(ready.rglob("*.o")) if each.relative_to(ready) != name]
    libraries = [f"-l{each}" for each in build_engine.LIBRARIES]
    library = tree / "kernel" / build_engine.LIBRARY
    subprocess.run(["gcc", "-shared", "-o", library, made, *others, *libraries, "-ldl"], check=True)
    return True


def _objects() -> Path:
    """A folder with the objects of the engine as it is, made anew for new sources. Processes take turns."""
    sources = sorted(_SOURCES.rglob("*.[ch]"))
    state = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    above = REPOSITORY / "build/mutants"
    above.mkdir(parents=True, exist_ok=True)
    ready = above / state
    with (above / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.is_dir():
            with tempfile.TemporaryDirectory(dir=above) as making:
                _compile_all(Path(making) / "objects")
                (Path(making) / "objects").rename(ready)
    return ready


def _compile_all(folder: Path) -> None:
    folder.mkdir()
    face = folder / "face.c"
    build_engine.engine_builder(REPOSITORY, ["-O1"], []).emit_c_code(str(face))

    def compiled(source: Path) -> None:
        output = folder / (source.relative_to(_SOURCES) if source != face else Path("face")).with_suffix(".o")
        output.parent.mkdir(exist_ok=True)
        subprocess.run(["gcc", *_FLAGS, "-c", "-o", output, source], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiled, [face, *_SOURCES.glob("*/*.c")]))
