"""Disks attached to dom0 itself, by `tapfs attach` and by `xl block-attach`."""

from __future__ import annotations

import tomllib
from functools import partial
from pathlib import Path

import trio

from tapfs.xen.device import OUR_KIND, Device
from tapfs.xen.host import Host
from tapfs.xen.toolstack.control_client import ask
from tapfs.xen.xenstore.client import connect
from tests.laboratory.commands import attempt, attempt_tapfs, digest, run, tapfs
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.contents import (
    FIXTURES,
    check_tree,
    drop_caches,
    mounted,
    new_qcow,
    new_raw,
    unpack_fixture,
    use_as_file_system,
    write_tree,
)
from tests.xen.scenarios.dom0 import IMAGES, Dom0, vdev_number


@scenario(60)
def raw(dom0: Dom0) -> None:
    image = new_raw("raw.img", 48)
    use_as_file_system(dom0.attach(f"tap:aio:{image}"))
    dom0.detach()
    run("e2fsck", "-fn", str(image))
    with mounted(str(image), "-o", "ro,loop") as place:
        check_tree(place)


@scenario(60)
def qcow(dom0: Dom0) -> None:
    use_and_check(dom0, "qcow", new_qcow("disk.qcow", 48))


@scenario(120)
def vmdk(dom0: Dom0) -> None:
    """Of several files, and of one."""
    for subformat in ("twoGbMaxExtentSparse", "monolithicSparse"):
        image = IMAGES / f"{subformat}.vmdk"
        tapfs("create", "--force", "-f", "vmdk", "-o", f"subformat={subformat}", str(image), "48M")
        use_and_check(dom0, "vmdk", image)


@scenario(120)
def vhd(dom0: Dom0) -> None:
    """A dynamic one, and a differencing one over it."""
    base, child = IMAGES / "base.vhd", IMAGES / "child.vhd"
    tapfs("create", "--force", "-f", "vhd", str(base), "48M")
    use_and_check(dom0, "vhd", base)
    tapfs("create", "--force", "-f", "vhd", "-b", base.name, "-F", "vhd", str(child))
    use_and_check(dom0, "vhd", child)


def use_and_check(dom0: Dom0, format_name: str, image: Path) -> None:
    """Make a file system on the disk of an image and use it; afterwards the image and the file system are sound."""
    use_as_file_system(dom0.attach(f"tap:{format_name}:{image}"))
    dom0.detach()
    tapfs("check", str(image))
    flat = IMAGES / "flat.img"
    tapfs("convert", "-O", "raw", str(image), str(flat))
    run("e2fsck", "-fn", str(flat))


@scenario(60)
def xl_block_attach(dom0: Dom0) -> None:
    image = new_qcow("xl.qcow", 48)
    use_as_file_system(dom0.xl_attach(f"tap:qcow:{image}"))
    dom0.xl_detach()
    tapfs("check", str(image))
    with mounted(dom0.xl_attach(f"tap:qcow:{image}", "xvdb", access="r"), "-o", "ro") as place:
        check_tree(place)
    dom0.xl_detach("xvdb")


@scenario(90)
def overlay(dom0: Dom0) -> None:
    base, image = new_raw("base-of-overlay.img", 32), IMAGES / "overlay.qcow"
    run("mke2fs", "-q", "-F", "-t", "ext4", str(base))
    with mounted(str(base), "-o", "loop") as place:
        write_tree(place)
    before = digest(base)
    tapfs("create", "--force", "-f", "qcow", "-b", str(base), "-F", "raw", str(image))
    device = dom0.attach(f"tap:qcow:{image}")
    with mounted(device) as place:
        check_tree(place)
        (place / "more").write_bytes(b"more" * 100_000)
    drop_caches()
    with mounted(device, "-o", "ro") as place:
        assert (place / "more").read_bytes() == b"more" * 100_000
    run("e2fsck", "-fn", device)
    dom0.detach()
    tapfs("check", str(image))
    assert digest(base) == before, "the parent was written"


@scenario(60)
def ram(dom0: Dom0) -> str:
    """Reads of it are copied to the frontend out of the host's own memory."""
    tapfs("create", "-f", "ram", "ram:attached", "32M")
    try:
        use_as_file_system(dom0.attach("tap:ram:attached"))
        dom0.detach()
        with mounted(dom0.attach("tap:ram:attached", mode="r"), "-o", "ro") as place:
            check_tree(place)
        counted = trio.run(ask, Device(OUR_KIND, 0, vdev_number("xvda")), "statistics")
        dom0.detach()
        return f"{counted['borrowed']} of {counted['reads']} reads borrowed"
    finally:
        tapfs("remove", "ram:attached")


@scenario(120)
def fixtures(dom0: Dom0) -> str:
    """Images that blktap wrote: the whole disk as it was then."""
    manifest = tomllib.loads((FIXTURES / "MANIFEST.toml").read_text(encoding="utf-8"))
    for raw_image in manifest["raw"]:
        unpack_fixture(raw_image["file"])
    for image in manifest["image"]:
        path = unpack_fixture(image["file"])
        device = dom0.attach(f"tap:qcow:{path}", mode="r")
        found = digest(device)
        dom0.detach()
        assert found == image["guest_sha256"], f"{path.name}: {found}"
    return f"{len(manifest['image'])} images"


@scenario(60)
def read_only(dom0: Dom0) -> None:
    image = new_raw("read-only.img", 8)
    before = digest(image)
    device = dom0.attach(f"tap:aio:{image}", mode="r")
    assert run("blockdev", "--getro", device) == "1"
    writing = attempt("dd", "if=/dev/urandom", f"of={device}", "bs=4096", "count=1", "oflag=direct")
    assert writing.returncode != 0
    dom0.detach()
    assert digest(image) == before


@scenario(90)
def refusals(dom0: Dom0) -> None:
    """What is wrong reaches the user, of tapfs and of xl, and leaves nothing behind."""
    answer = attempt_tapfs("attach", "tap:qcow:/images/missing.qcow", "--domain", "0", "--vdev", "xvda")
    assert answer.returncode != 0
    assert "/images/missing.qcow" in answer.stdout
    disk = "vdev=xvda,access=rw,script=block-tapfs,target=tap:qcow:/images/missing.qcow"
    answer = attempt("xl", "block-attach", "0", disk)
    assert "/images/missing.qcow" in answer.stdout
    attempt("xl", "block-detach", "0", "xvda")
    image = new_qcow("busy.qcow", 8)
    dom0.attach(f"tap:qcow:{image}", "xvda")
    second = attempt_tapfs("attach", f"tap:qcow:{image}", "--domain", "0", "--vdev", "xvdb")
    assert second.returncode != 0
    assert "busy.qcow" in second.stdout
    dom0.detach("xvda")
    answer = attempt_tapfs("attach", f"tap:qcow:{image}", "--domain", "77", "--vdev", "xvda")
    assert answer.returncode != 0
    assert "77" in answer.stdout


@scenario(60)
def xenstore_by_the_kernel(dom0: Dom0) -> None:
    """What many tasks ask of the kernel's device at once: none reads or writes with the words of another."""
    del dom0
    names = [f"{'x' * (number % 23)}{number}" for number in range(150)]

    async def work() -> None:
        found: dict[str, str | None] = {}
        async with connect(Host("/dev/xen/xenbus")) as store:

            async def read(name: str) -> None:
                found[name] = await store.read(f"/tool/tapfs/{name}")

            for each in (lambda name: store.write(f"/tool/tapfs/{name}", name), read):
                async with trio.open_nursery() as tasks:
                    for name in names:
                        tasks.start_soon(partial(each, name))
            await store.remove("/tool/tapfs")
        assert found == {name: name for name in names}

    trio.run(work)
