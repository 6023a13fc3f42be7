"""The options of `tapfs mount` and those after its `-o`, together."""

from __future__ import annotations

import pytest

from tapfs.cli.mount_options import settings_of, wants_writing
from tapfs.cli.parser import UsageError


@pytest.mark.parametrize(
    ("texts", "flags", "writable"),
    [
        ([], {}, False),
        ([], {"rw": True}, True),
        ([], {"ro": True}, False),
        (["ro"], {}, False),
        (["rw"], {}, True),
        (["ro,rw"], {}, True),
        (["ro,rw", "uid=5,ro"], {}, False),
        (["ro"], {"ro": True}, False),
        (["rw"], {"rw": True}, True),
        (["rw"], {"scratch": True}, True),
        ([], {"scratch": True}, False),
    ],
)
def test_access(texts: list[str], flags: dict[str, bool], *, writable: bool) -> None:
    assert wants_writing(texts, "p", **({"ro": False, "rw": False, "scratch": False} | flags)) is writable
    settings_of(texts, "p", files=False)


@pytest.mark.parametrize(
    ("texts", "flags"),
    [(["rw"], {"ro": True}), (["ro"], {"rw": True}), (["ro"], {"scratch": True}), ([], {"ro": True, "scratch": True})],
)
def test_contradictions(texts: list[str], flags: dict[str, bool]) -> None:
    with pytest.raises(UsageError):
        wants_writing(texts, "p", **({"ro": False, "rw": False, "scratch": False} | flags))


def test_what_is_true_of_every_mount_may_be_said() -> None:
    settings = settings_of(["nosuid,nodev,noatime,allow_other,nofail"], "p", files=False)
    assert settings.allow_other
    assert settings.flags == frozenset()


def test_options_for_the_file_system_inside() -> None:
    settings = settings_of(["errors=remount-ro,discard,noexec,max_read=4096"], "p", files=True)
    assert settings.inner == ("errors=remount-ro", "discard")
    assert settings.flags == {"noexec"}
    for option in ("errors=remount-ro", "discard", "suid"):
        with pytest.raises(UsageError, match=f"{option.partition('=')[0]} is for"):
            settings_of([option], "p", files=False)


@pytest.mark.parametrize("text", ["remount", "ro=1", "allow_other=yes", "umask=8", "errors", "discard=1"])
def test_unknown_options(text: str) -> None:
    with pytest.raises(UsageError):
        settings_of([text], "p", files=True)
