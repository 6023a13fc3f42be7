"""The one table from error kinds to errno and exit code."""

from __future__ import annotations

import ast
import copy
import errno
import pickle
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

import tapfs
from tapfs.cli.main import COMMANDS
from tapfs.errors import (
    CODES,
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    OPTIONS,
    ErrorKind,
    ImageError,
    from_os_error,
    options_as,
    spelled,
)
from tapfs.serving.messages import error_from_data, error_to_data
from tests.conftest import REPOSITORY


def test_the_table_is_total_and_its_exit_codes_are_distinct() -> None:
    assert set(CODES) == set(ErrorKind)
    exits = [codes.exit_code for codes in CODES.values()]
    assert len(set(exits)) == len(exits)
    assert not set(exits) & {0, 1, 3, EXIT_BUG, EXIT_INTERRUPTED}
    assert CODES[ErrorKind.INVALID_ARGUMENT].exit_code == EXIT_USAGE
    assert all(codes.errno in errno.errorcode for codes in CODES.values())


def test_every_kind_comes_back_from_its_own_errno_or_is_io() -> None:
    for kind, codes in CODES.items():
        back = from_os_error(OSError(codes.errno, ""), path="x", op="read").kind
        assert back in (kind, ErrorKind.IO)


def test_a_message_is_one_line_with_place_and_remedy() -> None:
    error = ImageError(ErrorKind.CORRUPT, "L2 entry 3 is wild", path="a\nb", offset=4096, op="map", remedy="repair it")
    assert str(error) == "a\\nb: L2 entry 3 is wild (at byte 0x1000); repair it"
    assert (error.errno, error.exit_code) == (errno.EUCLEAN, 2)


@pytest.mark.parametrize("kind", ErrorKind)
def test_an_image_error_is_an_os_error_with_its_number_and_file(kind: ErrorKind) -> None:
    error = ImageError(kind, "it failed", path="disk.qcow", offset=7, op="read", remedy="try again")
    assert isinstance(error, OSError)
    assert (error.errno, error.filename, error.strerror) == (CODES[kind].errno, "disk.qcow", "it failed")
    named = {
        ErrorKind.NOT_FOUND: FileNotFoundError,
        ErrorKind.EXISTS: FileExistsError,
        ErrorKind.DENIED: PermissionError,
    }
    for builtin in named.values():
        assert isinstance(error, builtin) == (named.get(kind) is builtin)


def test_a_missing_image_is_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        tapfs.open("/nonexistent/disk.qcow")
    assert isinstance(caught.value, tapfs.ImageError)
    assert caught.value.filename == "/nonexistent/disk.qcow"
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301
@pytest.mark.parametrize("kind", [ErrorKind.DENIED, ErrorKind.CORRUPT])
def test_an_error_goes_to_another_process_whole(kind: ErrorKind, again: object) -> None:
    error = ImageError(kind, "it failed", path="d", offset=1, op="read", remedy="try again")
    error.add_note("while converting")
    copied = again(error)  # type: ignore[operator]
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)
    assert (copied.errno, copied.filename) == (error.errno, error.filename)


def test_an_image_error_is_not_told_again_as_an_error_of_the_host() -> None:
    error = ImageError(ErrorKind.CORRUPT, "L2 entry 3 is wild", path="a", offset=4096, op="map")
    assert from_os_error(error, path="b", op="read") is error


def test_its_repr_tells_all() -> None:
    error = ImageError(ErrorKind.NOT_FOUND, "is missing", path="a", offset=0)
    assert repr(error) == "ImageError('not_found', 'is missing', path='a', offset=0)"


@pytest.mark.parametrize(
    ("way", "text"),
    [
        (None, "say format='raw' or force=True"),
        ("command_line", "say -f raw or --force"),
        ("mount_option", "say format=raw or force"),
    ],
)
def test_a_remedy_names_options_as_its_reader_writes_them(way: str | None, text: str) -> None:
    error = ImageError(ErrorKind.READ_ONLY, "is not writable", path="{rw}", remedy="say {format=raw} or {force}")
    for each in (error, copy.copy(error), error_from_data(error_to_data(error))):
        with options_as(way) if way else nullcontext():
            assert each.remedy == text
            assert str(each) == "{rw}: is not writable; " + text
    assert str(error) == "{rw}: is not writable; say format='raw' or force=True"


def test_other_braces_in_a_remedy_stay() -> None:
    assert spelled("open {a=b}, {} or {format = x}") == "open {a=b}, {} or {format = x}"


def remedies(folder: str) -> Iterator[tuple[Path, str]]:
    """The texts of remedies in the source."""
    for path in Path(REPOSITORY, folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = node.arg if isinstance(node, ast.keyword) else ""
            if isinstance(node, ast.Assign):
                named = ast.unparse(node.targets[0]).rpartition(".")[2]
            if isinstance(node, ast.keyword | ast.Assign) and named in {"remedy", "say_raw"}:
                texts = [each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)]
                yield path, "".join(text for text in texts if isinstance(text, str))


@pytest.mark.parametrize("folder", ["formats", "tapfs/disk", "tapfs/fuse", "tapfs/host", "tapfs/jobs"])
def test_below_the_front_ends_no_remedy_has_options_of_the_command_line(folder: str) -> None:
    for path, text in remedies(folder):
        assert all(name in OPTIONS for name in re.findall(r"\{([a-z_]+)", text)), (path, text)
        options = {each.command_line.split()[0] for each in OPTIONS.values()}
        assert "tapfs create" in text or "tapfs convert" in text or not options & set(text.split()), (path, text)


#: What follows the name of the program in a sentence, or in the name of a thread.
PROSE = {
    *("cannot", "does", "gives", "has", "knows", "makes", "only", "reads", "serves", "shows"),
    *("in", "with", "help", "window", "worker", "writeback"),
}


@pytest.mark.parametrize("folder", ["formats", "tapfs", "kernel"])
def test_messages_name_commands_that_there_are(folder: str) -> None:
    for path in Path(REPOSITORY, folder).rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        given = [value for call in calls for value in (*call.args, *(each.value for each in call.keywords))]
        texts = [each.value for value in given for each in ast.walk(value) if isinstance(each, ast.Constant)]
        for text in texts:
            for named in re.findall(r"\btapfs ([a-z][a-z-]*)", text) if isinstance(text, str) else ():
                assert named in {*COMMANDS, *PROSE}, (path, text)
