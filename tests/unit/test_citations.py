"""Citations lead somewhere: each file that code, tests or guides name is there, and so is each chapter.

A citation of a chapter is the file's path, a comma and the heading in quotation marks; the heading may be cut short:
`docs/specs/blktap-qcow.md, "Byte order of L1"`. Files of others are listed below.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.unit.test_import_rule import MAY_IMPORT

#: Files that are not ours, or that a text makes up as an example.
OF_OTHERS = re.compile(
    r"""
    (xen/include/public/)?(io/)?(blkif|ring|xs_wire|xenbus|grant_table)\.h
    | (include/uapi/xen/)?gntalloc\.h | evtchn\.h | xenctrl\.h
    | afflib\.h | sparse_format\.h | VDICore\.h | block/vmdk\.c | arch/um/drivers/cow_user\.c
    | (tests/)?(unit/)?test_MODULE\.py | tapfs_toy\.py | kernel/_engine\.c
    """,
    re.VERBOSE,
)

#: The specifications cite sources of many projects.
NOT_READ = ("docs/specs/", "fixtures/")

#: A path or name of a file with one of these endings, with `*` for any name; not the end of a longer word or address.
_FILE = re.compile(r"(?<![\w/.<*$\"'{}-])(?:[\w*-]+/)*[\w*-]+\.(?:py|pyi|c|h|md)\b(?![\w.]*\()")
_FOLDER = re.compile(
    r"(?<![\w/.<*$\"'{}-])(?:docs|formats|kernel|tests|tapfs|scripts|fixtures)/(?:[\w-]+/)*(?![\w*.<])"
)
_CHAPTER = re.compile(r"(?<![\w/.-])([\w./-]+\.md),\s+\"([^\"]+)\"")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)\)")
_C_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


def tracked() -> list[str]:
    """Everything that git knows or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (REPOSITORY / name).exists()]


TRACKED = tracked()
TEXTS = [
    name for name in TRACKED if name.endswith((".py", ".pyi", ".c", ".h", ".md")) and not name.startswith(NOT_READ)
]
#: Each file by all the ends of its path: `xen/xen.h` and `xen.h` are names of kernel/src/xen/xen.h.
ENDS = {"/".join(parts[at:]) for parts in (name.split("/") for name in TRACKED) for at in range(len(parts))}


def python_prose(source: str) -> Iterator[str]:
    """The comments and docstrings of a module; lines of comments that follow each other are one text."""
    block: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            block.append(token.string.lstrip("#: "))
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            yield " ".join(block)
            block = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


@cache
def prose(name: str) -> str:
    """What people read of a file: comments and docstrings, or all of a guide, without the breaks of its lines."""
    text = (REPOSITORY / name).read_text()
    if name.endswith((".py", ".pyi")):
        text = "\n".join(python_prose(text))
    elif name.endswith((".c", ".h")):
        text = re.sub(r"\n\s*\*", "\n", "\n".join(_C_COMMENT.findall(text)))
    return text


def exists(cited: str) -> bool:
    """Whether a path from the root, or the end of a path, is a file of ours."""
    if "*" in cited:
        return any(Path(name).match(cited) for name in TRACKED)
    return cited in ENDS or (REPOSITORY / cited).is_file()


def headings(name: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", (REPOSITORY / name).read_text(), re.MULTILINE)


def test_cited_files_exist() -> None:
    dead: dict[str, set[str]] = {}
    for name in TEXTS:
        text = prose(name)
        dead[name] = {cited for cited in _FILE.findall(text) if not OF_OTHERS.fullmatch(cited) and not exists(cited)}
        dead[name] |= {cited for cited in _FOLDER.findall(text) if not (REPOSITORY / cited).is_dir()}
    assert {name: cited for name, cited in dead.items() if cited} == {}


def test_cited_chapters_exist() -> None:
    for name in TEXTS:
        for path, heading in _CHAPTER.findall(prose(name)):
            assert path in TRACKED, f"{name}: cite {path} by its path from the root"
            cited = " ".join(heading.split())
            assert [found for found in headings(path) if found.startswith(cited)], f'{name}: {path} has no "{cited}"'


def test_links_of_guides_lead_somewhere() -> None:
    for name in TRACKED:
        if name.endswith(".md"):
            links = _LINK.findall((REPOSITORY / name).read_text())
            assert {link for link in links if not ((REPOSITORY / name).parent / link).exists()} == set(), name


def test_every_specification_is_in_the_index() -> None:
    folder = REPOSITORY / "docs/specs"
    listed = set(_LINK.findall((folder / "README.md").read_text()))
    assert {path.name for path in folder.glob("*.md")} - {"README.md"} <= listed


def test_the_drawing_of_the_architecture_is_the_listing() -> None:
    """ARCHITECTURE.md lists the folders of tapfs/ from top to bottom, and imports run down."""
    drawing = (REPOSITORY / "ARCHITECTURE.md").read_text().split("```")[1]
    wings = [re.findall(r"([a-z]+)/", line[:14]) for line in drawing.splitlines()]
    level = {wing: number for number, line in enumerate(wings) for wing in line}
    folders = {path.name for path in (REPOSITORY / "tapfs").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(level) == folders
    for wing, imported in MAY_IMPORT.items():
        assert {other for other in imported if level[other] <= level[wing]} == set(), wing


def test_a_citation_is_found_where_it_breaks_over_lines() -> None:
    block = '"""See docs/specs/xen.md,\n    "No such chapter".\n    """\n'
    block += "# of tests/gone.py, and\n# of kernel/gone/ as well\n"
    text = "\n".join(python_prose(block))
    assert _CHAPTER.findall(text) == [("docs/specs/xen.md", "No such chapter")]
    assert set(_FILE.findall(text)) == {"docs/specs/xen.md", "tests/gone.py"}
    assert _FOLDER.findall(text) == ["kernel/gone/"]
