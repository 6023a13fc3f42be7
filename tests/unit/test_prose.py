"""Heads of files and comments of constants name a thing: they are no indirect questions (CONTRIBUTING.md, "Prose")."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.conftest import REPOSITORY

_QUESTION = re.compile(r"(What|Who|Whom|Whose|Which|How|Where|When|Whether|Why)\b")
_CONSTANT = re.compile(r"^#: (?:What|Who|Whom|Whose|Which|How|Where)\b.*", re.MULTILINE)
_FOLDERS = ("tapfs", "formats", "kernel", "tests")


def head(path: Path) -> str:
    """The first words of a file's docstring or comment."""
    text = path.read_text()
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    return text.removeprefix("/*").lstrip("\n *")


def sources(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.[pch]*")]
    return [path for path in files if path.suffix in (".py", ".c", ".h") and path.name != "_engine.c"]


def test_no_head_is_an_indirect_question() -> None:
    ours = sources(*_FOLDERS)
    assert len(ours) > 400
    assert [str(path.relative_to(REPOSITORY)) for path in ours if _QUESTION.match(head(path))] == []


def test_no_comment_of_a_constant_is_an_indirect_question() -> None:
    questions = {str(path): _CONSTANT.findall(path.read_text()) for path in sources("tapfs", "formats", "kernel")}
    assert {path: found for path, found in questions.items() if found} == {}
