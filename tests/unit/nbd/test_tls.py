"""Files of keys and certificates: a fault is told by file and line, and never by what stands in the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.nbd.tls import tls_server


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# alice:00\n\n", "has no key"),
        ("alice:zz\n", "line 1 is no NAME:KEY"),
        ("a:00\n:00\n", "line 2 is no NAME:KEY"),
        ("5ec2e7", "line 1 is no NAME:KEY"),
        (f"alice:{'5e' * 65}", "line 1 is no NAME:KEY"),
        (f"{'x' * 300}:5ec2e7", "line 1 is no NAME:KEY"),
        ("alice:00\n" * 1025, "line 1025 is no NAME:KEY"),
    ],
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, text: str, message: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(text)
    with pytest.raises(ImageError, match=message) as raised:
        tls_server(certificates=None, keys=str(keys), verify_clients=False)
    assert raised.value.kind is ErrorKind.INVALID_ARGUMENT
    assert raised.value.path == str(keys)
    assert "5e" not in str(raised.value).removeprefix(str(keys))


def test_certificates_that_are_missing_or_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as missing:
        tls_server(certificates=str(tmp_path), keys=None, verify_clients=False)
    assert (missing.value.kind, missing.value.path) == (ErrorKind.NOT_FOUND, str(tmp_path / "server-cert.pem"))
    for name in ("server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_text("no certificate")
    with pytest.raises(ImageError, match="no certificate and key that belong together") as wrong:
        tls_server(certificates=str(tmp_path), keys=None, verify_clients=False)
    assert wrong.value.path == str(tmp_path / "server-cert.pem")
    with pytest.raises(ImageError) as authority:
        tls_server(certificates=str(tmp_path), keys=None, verify_clients=True)
    assert authority.value.path == str(tmp_path / "ca-cert.pem")
