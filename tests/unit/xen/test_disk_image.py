"""Settings from xenstore's keys, and opening by them: who lets whom in, what is refused and how it is said."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.plan_log import PlanLog
from tapfs.records import replace
from tapfs.xen.device import Device
from tapfs.xen.disk.disk_image import open_disk
from tapfs.xen.disk.settings import DEFAULT_MEMORY, DiskSettings, read_settings
from tapfs.xen.specification import DiskSpecification, parse_specification

SIZE = 1 << 20
DEVICE = Device("tap", 1, 51712)


class Keys:
    """A store that has the keys of one device."""

    def __init__(self, keys: dict[str, str]) -> None:
        self.keys = {f"{DEVICE.backend}/{name}": value for name, value in ({"state": "2"} | keys).items()}

    async def read(self, path: str) -> str | None:
        return self.keys.get(path)


async def settings_of(**keys: str) -> DiskSettings:
    named = {name.replace("_", "-").replace("tapfs-", "tapfs/", 1): value for name, value in keys.items()}
    return await read_settings(Keys(named), DEVICE)  # type: ignore[arg-type]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


def opened(path: str, mode: str, tmp_path: Path) -> tapfs.Image:
    # Another token is another disk.
    return open_disk(DiskSettings(parse_specification(path), mode), PlanLog(tmp_path / "plan", secrets.token_hex(16)))


async def test_settings() -> None:
    plain = await settings_of(params="tap:qcow:/a")
    assert plain == DiskSettings(DiskSpecification("/a", "qcow"), "r")
    assert plain.memory == DEFAULT_MEMORY
    every = await settings_of(
        params="tap:aio:/first",
        tapfs_spec="/second",
        tapfs_format="raw",
        tapfs_direct="1",
        tapfs_backing_formats="qcow,raw",
        mode="w!",
        tapfs_key_file="/key\n/base=/key of base",
        tapfs_grants="map",
        tapfs_paused="1",
        tapfs_limit_bytes="5",
        tapfs_limit_requests="6",
        tapfs_cache="9",
        tapfs_nice="-3",
        tapfs_memory="7",
        tapfs_open_files="8",
        removable="1",
        device_type="cdrom",
    )
    assert every == DiskSettings(
        DiskSpecification("/second", "raw", direct=True),
        "w!",
        ("qcow", "raw"),
        ("/key", "/base=/key of base"),
        "map",
        removable=True,
        cdrom=True,
        paused=True,
        limit_bytes=5,
        limit_requests=6,
        cache_bytes=9,
        nice=-3,
        memory=7,
        open_files=8,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "x"),
        ("params", ""),
        ("params", "tap:aio:"),
        ("tapfs_cache", "32M"),
        ("tapfs_nice", "high"),
        ("tapfs_nice", "20"),
        ("tapfs_nice", "--5"),
        ("tapfs_memory", "-1"),
        ("tapfs_memory", "1" * 30),
        ("tapfs_open_files", "1e3"),
        ("tapfs_limit_bytes", "٣"),
        ("tapfs_grants", "gift"),
    ],
)
async def test_settings_that_make_no_sense(name: str, value: str) -> None:
    with pytest.raises(ImageError) as raised:
        await settings_of(**({"params": "tap:qcow:/a"} | {name: value}))
    assert raised.value.kind in {ErrorKind.INVALID_FORMAT, ErrorKind.INVALID_ARGUMENT}


async def test_settings_of_a_device_that_is_gone() -> None:
    keys = Keys({})
    keys.keys.clear()
    with pytest.raises(ImageError) as raised:
        await read_settings(keys, DEVICE)  # type: ignore[arg-type]
    assert raised.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("w", "w", False),
        ("w", "r", False),
        ("r", "w", False),
        ("w!", "w", False),
        ("w", "w!", False),
        ("r", "r", True),
        ("r", "w!", True),
        ("w!", "r", True),
        ("w!", "w!", True),
    ],
)
def test_who_lets_whom_in(raw: Path, tmp_path: Path, first: str, second: str, *, both: bool) -> None:
    with opened(f"tap:aio:{raw}", first, tmp_path):
        if both:
            opened(f"tap:aio:{raw}", second, tmp_path).close()
            return
        with pytest.raises(ImageError) as raised:
            opened(f"tap:aio:{raw}", second, tmp_path)
    assert raised.value.kind is ErrorKind.LOCKED
    assert f"process {os.getpid()}" in str(raised.value)
    assert "mode w!" in str(raised.value)


def test_three_readers_and_two_who_share(raw: Path, tmp_path: Path) -> None:
    disks = [opened(f"tap:aio:{raw}", mode, tmp_path) for mode in ("r", "w!", "r", "w!", "r")]
    disks[1].write(0, b"seen")
    assert [disk.read(0, 4) for disk in disks] == [b"seen"] * 5
    for disk in disks:
        disk.close()


@pytest.mark.parametrize(
    ("params", "kind", "says"),
    [
        ("tap:qcow:/nowhere/x", ErrorKind.NOT_FOUND, "/nowhere/x"),
        ("{raw}", ErrorKind.READ_ONLY, "attach tap:aio:{raw}, or say -f raw, if it is one"),
        (
            "{foreign}",
            ErrorKind.UNSUPPORTED,
            "or attach tap:aio:{foreign}, or say -f raw, to take its bytes as they are",
        ),
        ("tap:bochs:{foreign}", ErrorKind.UNSUPPORTED, "{foreign}: unknown format 'bochs'"),
        ("tap:qcow:{raw}", ErrorKind.INVALID_FORMAT, "{raw}"),
        ("tap:aio:{short}", ErrorKind.OUT_OF_BOUNDS, "not one sector"),
        ("tap:ram:not-there-at-all", ErrorKind.NOT_FOUND, "not-there-at-all"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, raw: Path, params: str, kind: ErrorKind, says: str) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"short")
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"Bochs Virtual HD Image" + bytes(4096))
    for mode in ("w", "r") if kind is ErrorKind.UNSUPPORTED else ("w",):
        with pytest.raises(ImageError) as raised:
            opened(params.format(raw=raw, short=short, foreign=foreign), mode, tmp_path)
        assert raised.value.kind is kind
        assert says.format(raw=raw, foreign=foreign) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_guess_is_good_enough_to_read(raw: Path, tmp_path: Path) -> None:
    with opened(str(raw), "r", tmp_path) as disk:
        assert disk.format_name == "raw"


def test_an_overlay_is_opened_with_the_formats_that_were_noted(tmp_path: Path, raw: Path) -> None:
    """A parent that looks like an image with a further file: a guest can write that into a raw disk."""
    forged = tmp_path / "forged"
    tapfs.create(str(forged), "qcow", SIZE, backing=str(raw), backing_format="raw")
    raw.write_bytes(forged.read_bytes().ljust(SIZE, b"\0"))
    over = tmp_path / "over"
    tapfs.create(str(over), "qcow", SIZE, backing=str(raw), backing_format="raw")
    log = PlanLog(tmp_path / "plan", "token")
    with pytest.raises(ImageError):
        open_disk(DiskSettings(DiskSpecification(str(over), "qcow"), "w"), log)
    settings = DiskSettings(DiskSpecification(str(over), "qcow"), "w", backing_formats=("raw",))
    with open_disk(settings, log) as disk:
        assert disk.read(0, 4) == b"QFI\xfb"


async def test_the_images_of_a_chain_have_their_own_passwords(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    keys: list[str] = []
    for image, parent in ((base, None), (top, str(base))):
        (tmp_path / f"{image.name}.key").write_text(f"of {image.name}\n")
        keys.append(f"{image}={tmp_path / image.name}.key")
        tapfs.create(
            image, "qcow", SIZE, backing=parent, backing_format=parent and "qcow", password=f"of {image.name}".encode()
        )
        if image == base:
            with tapfs.open(base, writable=True, password=b"of base") as disk:
                disk.write(0, b"below")
    for settings in (
        await settings_of(params=f"tap:qcow:{top}", mode="w", tapfs_key_file="\n".join(keys)),
        await settings_of(params=f"tap:qcow,key-file={keys[0]},key-file={keys[1]}:{top}", mode="w"),
    ):
        assert settings.key_files == tuple(keys)
        with open_disk(settings, PlanLog(tmp_path / "1.plan", "token")) as disk:
            assert disk.read(0, 5) == b"below"
            disk.write(4096, b"above")


async def test_what_xl_cannot_say_stands_in_the_target() -> None:
    found = await settings_of(params="tap:qcow,key-file=/k,nice=5,backing-formats=raw:/a,xvda,w!", mode="w")
    assert (found.key_files, found.nice, found.backing_formats, found.mode) == (("/k",), 5, ("raw",), "w!")
    # A mode r is never widened, and what `tapfs attach` said comes first.
    found = await settings_of(params="tap:qcow,nice=5:/a,xvda,w!", mode="r", tapfs_nice="7")
    assert (found.nice, found.mode) == (7, "r")
    with pytest.raises(ImageError, match="nice"):
        await settings_of(params="tap:qcow,nice=x:/a")


async def test_what_the_disk_string_says_holds_for_what_is_served_instead() -> None:
    """After `swap --keep-names` of a disk of xl's, whose keys tell the next process nothing but the image."""
    target = "tap:aio,key-file=/k,nice=5,wait-on=nothing,grants=persistent,memory=1000,backing-formats=vhd:/a,xvda,w!"
    found = await settings_of(params=target, mode="w", tapfs_spec="tap:qcow:/b")
    before = await settings_of(params=target, mode="w")
    assert (found.specification.path, found.specification.format) == ("/b", "qcow")
    assert found.specification.direct
    assert found == replace(before, specification=found.specification, backing_formats=())
    assert (before.key_files, before.nice, before.wait_on, before.mode) == (("/k",), 5, "nothing", "w!")


async def test_discards_can_be_forbidden() -> None:
    assert (await settings_of(params="tap:qcow:/a")).discard is True
    assert (await settings_of(params="tap:qcow:/a", discard_enable="1")).discard is True
    assert (await settings_of(params="tap:qcow:/a", discard_enable="0")).discard is False
