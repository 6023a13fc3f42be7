"""The one table from error kinds to errno and exit code."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest

import tapfs
from tapfs.errors import CODES, EXIT_BUG, EXIT_INTERRUPTED, EXIT_USAGE, ErrorKind, ImageError, from_os_error


def test_the_table_is_total_and_its_exit_codes_are_distinct() -> None:
    assert set(CODES) == set(ErrorKind)
    exits = [codes.exit_code for codes in CODES.values()]
    assert len(set(exits)) == len(exits)
    assert not set(exits) & {0, 1, 3, EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED}
    assert all(codes.errno in errno.errorcode for codes in CODES.values())


def test_every_kind_comes_back_from_its_own_errno_or_is_io() -> None:
    for kind, codes in CODES.items():
        back = from_os_error(OSError(codes.errno, ""), path="x", op="read").kind
        assert back in (kind, ErrorKind.IO)


def test_a_message_is_one_line_with_place_and_remedy() -> None:
    error = ImageError(ErrorKind.CORRUPT, "L2 entry 3 is wild", path="a\nb", offset=4096, op="map", remedy="repair it")
    assert str(error) == "'a\\nb': L2 entry 3 is wild (at byte 0x1000); repair it"
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
