"""The head of each module and C file names a thing: it is no indirect question (CONTRIBUTING.md, "Prose")."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.conftest import REPOSITORY

_QUESTION = re.compile(r"(What|Who|Whom|Whose|Which|How|Where|When|Whether|Why)\b")
_FOLDERS = ("tapfs", "formats", "kernel", "tests")


def head(path: Path) -> str:
    """The first words of a file's docstring or comment."""
    text = path.read_text()
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    return text.removeprefix("/*").lstrip("\n *")


def test_no_head_is_an_indirect_question() -> None:
    files = [path for folder in _FOLDERS for path in (REPOSITORY / folder).rglob("*.[pch]*")]
    ours = [path for path in files if path.suffix in (".py", ".c", ".h") and path.name != "_engine.c"]
    assert len(ours) > 400
    assert [str(path.relative_to(REPOSITORY)) for path in ours if _QUESTION.match(head(path))] == []
