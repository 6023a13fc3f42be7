"""The one table from error kinds to errno and exit code."""

from __future__ import annotations

import errno

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
