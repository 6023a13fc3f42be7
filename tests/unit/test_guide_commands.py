"""Command lines of the guides stand in blocks of the language `console`, so that they are run (tests/unit/guides)."""

from __future__ import annotations

from tests.conftest import REPOSITORY
from tests.unit.guides.guide_commands import REASONS, commands, pages, unmarked_commands
from tests.unit.guides.prepared import PREPARE


def test_no_command_line_is_outside_of_a_console_block() -> None:
    assert [line for page in pages() for line in unmarked_commands(page)] == []


def test_what_is_not_run_says_why() -> None:
    found = [command for page in pages() for command in commands(page)]
    assert {command.reason for command in found} - {None} <= REASONS
    assert sum(command.reason is None for command in found) > 60


def test_each_page_whose_commands_run_has_its_images() -> None:
    """tests/unit/guides/prepared.py makes them."""
    runs = {str(page.relative_to(REPOSITORY)) for page in pages() if any(not each.reason for each in commands(page))}
    assert runs == set(PREPARE)
