"""A disk in a package is opened in its place: archives, descriptors, chunks."""

from __future__ import annotations

import gzip
import random
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard

import tapfs as api
from tapfs import ErrorKind, ImageError
from tests import package_files

Run = Callable[..., Any]
MIB = 1 << 20
SIZE = 4 * MIB

#: How qemu-img makes the image of a disk.
FORMATS = {
    "a.vmdk": ["-O", "vmdk", "-o", "subformat=streamOptimized"],
    "b.qcow2": ["-O", "qcow2"],
    "c.vhdx": ["-O", "vhdx"],
    "d.vhd": ["-O", "vpc", "-o", "force_size=on"],
    "e.vdi": ["-O", "vdi"],
}


@pytest.fixture(scope="module")
def disk() -> bytes:
    """Data, zeros, and data at the end."""
    noise = random.Random(1)
    return noise.randbytes(MIB + 512) + bytes(2 * MIB) + b"text " * 1000 + bytes(MIB - 512 - 5000)


@pytest.fixture(scope="module")
def images(disk: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The disk in images of several formats."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "raw").write_bytes(disk)
    for name, options in FORMATS.items():
        subprocess.run(["qemu-img", "convert", "-f", "raw", *options, folder / "raw", folder / name], check=True)
    return {name: (folder / name).read_bytes() for name in FORMATS} | {"f.img": disk}


def read(path: Path, **options: Any) -> bytes:
    with api.open(path, **options) as image:
        return image.read(0, image.size)


def refusal(path: Path, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught, api.open(path, **options):
        pass
    return caught.value


def test_each_disk_of_an_ova_is_read_in_its_place(images: dict[str, bytes], disk: bytes, tmp_path: Path) -> None:
    path = package_files.ova(tmp_path / "x.ova", images)
    for number in range(1, len(images) + 1):
        assert read(path, disk=number) == disk
    listed = api.package_info(path)
    assert listed is not None
    assert [each["format"] for each in listed["disks"]] == ["vmdk", "qcow2", "vhdx", "vhd", "vdi", "raw"]
    assert {each["virtual_size"] for each in listed["disks"]} == {SIZE}
    assert not [each["error"] for each in listed["disks"] if each["error"]]


def test_the_engine_reads_the_window_and_nothing_behind_it(tmp_path: Path) -> None:
    """A raw member ends where the next one's header begins, and holes are those of its own bytes."""
    first, second = random.Random(2).randbytes(3 * 512), b"\xff" * 4096
    path = package_files.archive(tmp_path / "x.ova", {"x.ovf": package_files.ovf(["a", "b"]), "a": first, "b": second})
    with api.open(path, disk=1) as image:
        assert image.size == len(first)
        assert image.read(512, 1024) == first[512:]
        assert [(each.offset, each.length, each.host_offset) for each in image.extents()] == [(0, len(first), 0)]
        assert image.whole_file() is None
    assert read(path, disk=2) == second


def test_several_disks_need_a_choice_and_one_does_not(tapfs: Run, images: dict[str, bytes], tmp_path: Path) -> None:
    two = {name: images[name] for name in ("a.vmdk", "b.qcow2")}
    path = package_files.ova(tmp_path / "x.ova", two)
    ran = tapfs("map", path)
    assert ran.code == 64
    assert "holds 2 disks: 1 a.vmdk, 2 b.qcow2" in ran.err
    assert "--disk N" in ran.err
    assert "has no disk 3" in tapfs("map", "--disk", 3, path).err
    one = package_files.ova(tmp_path / "y.ova", {"b.qcow2": images["b.qcow2"]})
    assert tapfs("compare", "--second-disk", 2, one, path).out == "Images are identical.\n"
    assert "2: b.qcow2, qcow2, 4 MiB" in tapfs("info", path).out
    assert tapfs("info", "--json", path).code == 0
    assert "virtual size" in tapfs("info", "--disk", 1, path).out


def test_a_parent_in_the_same_archive_is_opened_there(tapfs: Run, tmp_path: Path) -> None:
    """A chain of three in a folder of an archive. Nothing beside the archive is opened for it."""
    content = random.Random(3).randbytes(MIB)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "raw").write_bytes(content)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "base.qcow2"], check=True, cwd=inside)
    for name, base in (("mid.qcow2", "base.qcow2"), ("top.qcow2", "mid.qcow2")):
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", name]
        subprocess.run(words, check=True, cwd=inside)
        with api.open(inside / name, writable=True) as image:
            image.write(len(name) * 70_000, name.encode())
    wanted = read(inside / "top.qcow2")
    files = {f"d/{name}": (inside / name).read_bytes() for name in ("top.qcow2", "mid.qcow2", "base.qcow2")}
    path = package_files.archive(tmp_path / "x.ova", {"x.ovf": package_files.ovf(["d/top.qcow2"]), **files})
    assert read(path) == wanted
    with api.open(path) as image:
        assert [Path(parent).name for parent in image.parents] == ["mid.qcow2", "base.qcow2"]
    assert tapfs("check", path).code == 0
    assert refusal(path, gate=api.Gate.nothing()).kind in {ErrorKind.DENIED, ErrorKind.NOT_FOUND}
    del files["d/mid.qcow2"]
    (tmp_path / "mid.qcow2").write_bytes((inside / "mid.qcow2").read_bytes())
    path = package_files.archive(tmp_path / "y.ova", {"y.ovf": package_files.ovf(["d/top.qcow2"]), **files})
    assert "mid.qcow2" in str(refusal(path))


def test_two_disks_of_one_archive_are_not_taken_for_one(tmp_path: Path) -> None:
    """Both lie in one file of the host, and are mapped alike, also where they are packed there."""
    for number in (1, 2):
        (tmp_path / "raw").write_bytes(random.Random(number).randbytes(MIB))
        words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / f"{number}.qcow2"]
        subprocess.run(words, check=True)
    path = package_files.ova(tmp_path / "x.ova", {f"{n}.qcow2": (tmp_path / f"{n}.qcow2").read_bytes() for n in (1, 2)})
    with api.open(path, disk=1) as first, api.open(path, disk=2) as second, api.open(path, disk=1) as again:
        assert [(each.offset, each.length) for each in api.diff(first, second)] == [(0, MIB)]
        assert not [*api.diff(first, again)]
    packed = {f"{n}.gz": gzip.compress((tmp_path / f"{n}.qcow2").read_bytes(), 1) for n in (1, 2)}
    descriptor = package_files.ovf(packed, attributes={"compression": "gzip"})
    path = package_files.archive(tmp_path / "y.ova", {"y.ovf": descriptor, **packed})
    with api.open(path, disk=1) as first, api.open(path, disk=2) as second:
        assert [(each.offset, each.length) for each in api.diff(first, second)] == [(0, MIB)]


def test_a_disk_is_chosen_in_a_package_only(tapfs: Run, images: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "b.qcow2").write_bytes(images["b.qcow2"])
    assert "is no package of disks" in tapfs("info", "--disk", 1, tmp_path / "b.qcow2").err
    assert tapfs("info", "--disk", 0, tmp_path / "b.qcow2").code == 64
    path = package_files.ova(tmp_path / "x.ova", {"b.qcow2": images["b.qcow2"]})
    assert '"format": "raw"' in tapfs("info", "--json", "-f", "raw", path).out
    assert read(path, format="raw") == path.read_bytes()
    assert read(path, disk=1, format="raw") == images["b.qcow2"]


def test_an_archive_is_not_written_but_an_overlay_over_it_is(
    images: dict[str, bytes], disk: bytes, tmp_path: Path
) -> None:
    path = package_files.ova(tmp_path / "x.ova", {name: images[name] for name in ("a.vmdk", "b.qcow2")})
    before = path.read_bytes()
    error = refusal(path, disk=1, writable=True)
    assert error.kind is ErrorKind.READ_ONLY
    assert "overlay=FILE" in str(error)
    with api.open(path, disk=2, overlay=tmp_path / "o.qcow") as image:
        image.write(0, b"new")
    assert read(path, disk=2, overlay=tmp_path / "o.qcow") == b"new" + disk[3:]
    # The overlay is one over the second disk, not over the package.
    assert refusal(path, disk=1, overlay=tmp_path / "o.qcow").kind is ErrorKind.EXISTS
    # Opened by itself it finds that disk, as far as it may name a file in that place.
    assert read(tmp_path / "o.qcow") == b"new" + disk[3:]
    assert refusal(tmp_path / "o.qcow", backing_root=tmp_path / "elsewhere").kind is ErrorKind.DENIED
    assert path.read_bytes() == before
    path.rename(tmp_path / "moved.ova")
    assert refusal(tmp_path / "o.qcow").kind is ErrorKind.NOT_FOUND


@pytest.mark.parametrize("archived", [True, False])
def test_an_ovf_says_which_of_its_disks_lies_over_which(
    tapfs: Run, images: dict[str, bytes], disk: bytes, tmp_path: Path, *, archived: bool
) -> None:
    """The image itself names a file that the package has under another name."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "base.qcow2").write_bytes(images["b.qcow2"])
    for child, parent in (("child.qcow2", "base.qcow2"), ("grandchild.qcow2", "child.qcow2")):
        assert tapfs("create", "-f", "qcow2", "-b", made / parent, "-F", "qcow2", made / child).code == 0
        with api.open(made / child, writable=True, write_base=True) as image:
            image.write(len(child), child.encode())
        assert tapfs("rebase", "-u", "-b", parent, "-F", "qcow2", made / child).code == 0
    expected = read(made / "grandchild.qcow2")
    files = {
        f"disk{at}.qcow2": (made / name).read_bytes()
        for at, name in enumerate(("grandchild.qcow2", "base.qcow2", "child.qcow2"))
    }
    descriptor = package_files.ovf(files)
    for child, parent in (("disk0", "disk2"), ("disk2", "disk1")):
        start = f'ovf:diskId="{child}"'.encode()
        descriptor = descriptor.replace(start, start + f' ovf:parentRef="{parent}"'.encode())
    path = tmp_path / "x.ovf"
    if archived:
        path = package_files.archive(tmp_path / "x.ova", {"x.ovf": descriptor, **files})
    else:
        for name, content in {"x.ovf": descriptor, **files}.items():
            (tmp_path / name).write_bytes(content)
    assert read(path, disk=1) == expected
    assert read(path, disk=2) == disk
    # One that lies over nothing by its own word would show zeros.
    wrong = descriptor.replace(b'ovf:diskId="disk1"', b'ovf:diskId="disk1" ovf:parentRef="disk0"')
    unlisted = descriptor.replace(b'ovf:parentRef="disk2"', b'ovf:parentRef="disk9"')
    (tmp_path / "y.ovf").write_bytes(wrong)
    (tmp_path / "z.ovf").write_bytes(unlisted)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert "has no parent" in str(refusal(tmp_path / "y.ovf", disk=2))
    assert refusal(tmp_path / "z.ovf", disk=1).kind is ErrorKind.CORRUPT


def test_files_beside_an_ovf_a_vmx_and_a_vbox_are_opened_and_written(
    images: dict[str, bytes], disk: bytes, tmp_path: Path
) -> None:
    for name in ("b.qcow2", "e.vdi"):
        (tmp_path / name).write_bytes(images[name])
    subprocess.run(["qemu-img", "convert", "-O", "vmdk", tmp_path / "b.qcow2", tmp_path / "x y.vmdk"], check=True)
    (tmp_path / "x.ovf").write_bytes(package_files.ovf(["b.qcow2"]))
    devices = {"scsi0:1.fileName": "x y.vmdk", "ide1:0.fileName": "cd.iso", "scsi0:0.fileName": "no.vmdk"}
    (tmp_path / "x.vmx").write_bytes(package_files.vmx(devices | {"scsi0:0.present": "FALSE"}))
    (tmp_path / "x.vbox").write_bytes(
        package_files.vbox('<HardDisk uuid="{A}" location="e.vdi" format="VDI"/>', ["{a}"])
    )
    for name in ("x.ovf", "x.vmx", "x.vbox"):
        assert read(tmp_path / name) == disk
        with api.open(tmp_path / name, writable=True) as image:
            image.write(SIZE - 4, b"tail")
        assert read(tmp_path / name) == disk[:-4] + b"tail"


def test_the_newest_of_differencing_images_is_the_disk_of_a_vbox(tapfs: Run, disk: bytes, tmp_path: Path) -> None:
    """Its parent has no name: it is found in the folder where the registry has it."""
    (tmp_path / "raw").write_bytes(disk)
    (tmp_path / "Snapshots").mkdir()
    base, leaf = tmp_path / "base.vdi", tmp_path / "Snapshots/{leaf}.vdi"
    assert tapfs("convert", "-f", "raw", "-O", "vdi", tmp_path / "raw", base).code == 0
    assert tapfs("create", "-f", "vdi", "-b", base, "-F", "vdi", leaf).code == 0
    with api.open(leaf, writable=True, parent_folders=[tmp_path]) as image:
        image.write(0, b"leaf")
    registry = (
        '<HardDisk uuid="{B}" location="base.vdi" format="VDI">'
        '<HardDisk uuid="{L}" location="Snapshots/{leaf}.vdi" format="VDI"/></HardDisk>'
    )
    (tmp_path / "x.vbox").write_bytes(package_files.vbox(registry, ["{l}"]))
    assert read(tmp_path / "x.vbox") == b"leaf" + disk[4:]


@pytest.mark.parametrize(
    "place", ["/home/joe/VirtualBox VMs/m/{}", r"C:\Users\joe\VirtualBox VMs\m\{}", "[datastore1] m/{}"]
)
def test_files_of_a_moved_machine_are_found_beside_its_description(
    images: dict[str, bytes], disk: bytes, tmp_path: Path, place: str
) -> None:
    (tmp_path / "e.vdi").write_bytes(images["e.vdi"])
    (tmp_path / "Snapshots").mkdir()
    (tmp_path / "Snapshots/a.vmdk").write_bytes(images["a.vmdk"])
    registry = f'<HardDisk uuid="a" location="{place.format("e.vdi")}" format="VDI"/>'
    (tmp_path / "x.vbox").write_bytes(package_files.vbox(registry, ["a"]))
    (tmp_path / "x.vmx").write_bytes(package_files.vmx({"sata0:0.fileName": place.format("Snapshots/a.vmdk")}))
    assert read(tmp_path / "x.vbox") == read(tmp_path / "x.vmx") == disk
    (tmp_path / "e.vdi").unlink()
    assert "there is no e.vdi beside the package" in str(refusal(tmp_path / "x.vbox"))


def test_a_file_beside_an_ovf_stands_for_one_in_a_folder(images: dict[str, bytes], disk: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.qcow2").write_bytes(images["b.qcow2"])
    (tmp_path / "x.ovf").write_bytes(package_files.ovf(["group/b.qcow2"]))
    assert read(tmp_path / "x.ovf") == disk


@pytest.mark.parametrize("old", ["/vmfs/volumes/5f00aa/m/e.vdi", r"D:\m\e.vdi", "[datastore2] m/e.vdi"])
@pytest.mark.parametrize("local", ["e.vdi", "./e.vdi", "/vmfs/volumes/3e11bb/m/e.vdi", "[datastore1] e.vdi"])
def test_the_file_of_one_disk_is_not_taken_for_that_of_another(
    images: dict[str, bytes], tmp_path: Path, local: str, old: str
) -> None:
    """ESX gives a second disk on another datastore the same name. The last part of it is no place for two."""
    (tmp_path / "e.vdi").write_bytes(images["e.vdi"])
    registry = "".join(
        f'<HardDisk uuid="{uuid}" location="{name}" format="VDI"/>' for uuid, name in (("a", local), ("b", old))
    )
    (tmp_path / "x.vbox").write_bytes(package_files.vbox(registry, ["a", "b"]))
    error = refusal(tmp_path / "x.vbox", disk=2, writable=True)
    assert "there is no e.vdi beside the package" not in str(error)
    assert (tmp_path / "e.vdi").read_bytes() == images["e.vdi"]


def test_two_files_of_one_name_are_found_in_the_folders_of_their_names(
    images: dict[str, bytes], tmp_path: Path
) -> None:
    content = {name: random.Random(name).randbytes(MIB) for name in ("a", "b")}
    for name, held in content.items():
        (tmp_path / name).mkdir()
        (tmp_path / "raw").write_bytes(held)
        words = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", tmp_path / "raw", tmp_path / name / "x.vmdk"]
        subprocess.run(words, check=True)
    (tmp_path / "x.vmdk").write_bytes(images["a.vmdk"])
    machine = {"scsi0:0.fileName": "/vmfs/volumes/a/x.vmdk", "scsi0:1.fileName": "/vmfs/volumes/b/x.vmdk"}
    (tmp_path / "x.vmx").write_bytes(package_files.vmx(machine))
    assert read(tmp_path / "x.vmx", disk=1) == content["a"]
    assert read(tmp_path / "x.vmx", disk=2) == content["b"]
    (tmp_path / "b/x.vmdk").unlink()
    assert "there is no b/x.vmdk beside the package" in str(refusal(tmp_path / "x.vmx", disk=2))


def test_a_name_relative_to_its_package_is_that_file_or_none(images: dict[str, bytes], tmp_path: Path) -> None:
    """Such a name stays right when a machine moves."""
    machine = tmp_path / "m"
    machine.mkdir()
    (machine / "a.vmdk").write_bytes(images["a.vmdk"])
    (machine / "x.vmx").write_bytes(package_files.vmx({"scsi0:0.fileName": "../base/a.vmdk"}))
    assert refusal(machine / "x.vmx").kind is ErrorKind.DENIED
    error = refusal(machine / "x.vmx", backing_root=str(tmp_path))
    assert error.kind is ErrorKind.NOT_FOUND
    assert "its file ../base/a.vmdk is missing; put it there" in str(error)


def test_a_vmx_of_a_hand_has_no_quotes(images: dict[str, bytes], disk: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.vmdk").write_bytes(images["a.vmdk"])
    quoted = package_files.vmx({"scsi0:0.fileName": "a.vmdk", "scsi0:1.present": "FALSE", "scsi0:1.fileName": "b.vmdk"})
    (tmp_path / "x.vmx").write_bytes(quoted.replace(b'"', b"").replace(b"a.vmdk", b"a.vmdk  # the disk"))
    assert read(tmp_path / "x.vmx") == disk


@pytest.mark.parametrize("reference", ["file0", "group/b.qcow2"])
def test_the_disks_of_ovirt_and_of_ovf_0_9_are_in_a_section_of_a_type(
    images: dict[str, bytes], disk: bytes, tmp_path: Path, reference: str
) -> None:
    """RHEV and oVirt refer to files by their names; the envelope of OVF 0.9 has a namespace of VMware's."""
    (tmp_path / "group").mkdir()
    (tmp_path / "group/b.qcow2").write_bytes(images["b.qcow2"])
    text = package_files.ovf(["group/b.qcow2"]).replace(b"DiskSection>", b"Section>")
    text = text.replace(b"<Section>", b'<Section xsi:type="ovf:DiskSection_Type">').replace(
        b'ovf:fileRef="file0"', f'ovf:fileRef="{reference}"'.encode()
    )
    xsi = b'<Envelope xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
    old = text.replace(b"<Envelope ", xsi).replace(
        b"http://schemas.dmtf.org/ovf/envelope/1", b"http://www.vmware.com/schema/ovf/1/envelope"
    )
    for content in (text.replace(b"<Envelope ", xsi), old):
        (tmp_path / "x.ovf").write_bytes(content)
        assert read(tmp_path / "x.ovf") == disk


def test_the_parents_that_ovirt_names_are_files_and_no_disks(
    tapfs: Run, images: dict[str, bytes], disk: bytes, tmp_path: Path
) -> None:
    """Of a machine with snapshots it lists each image, and the image itself names its parent."""
    (tmp_path / "group").mkdir()
    (tmp_path / "group/base").write_bytes(images["b.qcow2"])
    assert tapfs("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", tmp_path / "group/top").code == 0
    text = package_files.ovf(["group/base", "group/top"]).replace(b"</DiskSection>", b"</Section>")
    section = b'<Section xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:type="ovf:DiskSection_Type">'
    text = text.replace(b"<DiskSection>", section)
    for named in (b"group/base", b"group/top"):
        start = b'ovf:diskId="disk1"'
        content = text.replace(start, start + b' ovf:parentRef="' + named + b'"')
        (tmp_path / "x.ovf").write_bytes(content)
        assert read(tmp_path / "x.ovf", disk=1) == read(tmp_path / "x.ovf", disk=2) == disk


@pytest.mark.parametrize("checksum", ["xxhash", "checksum"])
def test_the_disks_of_an_xva_are_read_from_their_chunks(tapfs: Run, disk: bytes, tmp_path: Path, checksum: str) -> None:
    small = b"x" * MIB + b"y" * 512
    path = package_files.xva(tmp_path / "x.xva", {"Ref:7": disk, "Ref:12": small}, checksum=checksum)
    assert read(path, disk=1) == disk
    assert read(path, disk=2) == small
    with api.open(path, disk=1) as image:
        assert image.read(MIB + 100, 1000) == disk[MIB + 100 : MIB + 1100]
        data = [each for each in image.extents() if each.host_offset is not None]
        assert sum(each.length for each in data) < SIZE
    assert tapfs("convert", "--disk", 2, path, tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == small
    assert tapfs("check", path).code == 0


def test_an_xva_is_ordered_by_device_and_short_chunks_end_in_zeros(tmp_path: Path) -> None:
    sizes = {"Ref:1": 2 * MIB, "Ref:2": MIB}
    members = {
        "ova.xml": package_files.ova_xml(sizes, device={"Ref:1": "10", "Ref:2": "9"}),
        "Ref:1/00000001": b"a" * 1024,
        "Ref:1/00000000": b"",
        "Ref:2/00000000": b"b" * MIB,
    }
    path = package_files.archive(tmp_path / "x.xva", members)
    assert read(path, disk=1) == b"b" * MIB
    assert read(path, disk=2) == bytes(MIB) + b"a" * 1024 + bytes(MIB - 1024)


def test_boxes_of_vagrant(images: dict[str, bytes], disk: bytes, tmp_path: Path) -> None:
    libvirt = b'{"provider": "libvirt", "format": "qcow2", "virtual_size": 1}'
    listed = b'{"provider": "libvirt", "disks": [{"path": "one.img", "format": "qcow2"}, {"path": "two.img"}]}'
    plain = {"./metadata.json": libvirt, "./Vagrantfile": b"", "./box.img": images["b.qcow2"]}
    several = {"metadata.json": listed, "one.img": images["b.qcow2"], "two.img": images["f.img"]}
    virtualbox = {"box.ovf": package_files.ovf(["a.vmdk"]), "a.vmdk": images["a.vmdk"], "metadata.json": b"{}"}
    hyper_v = {"metadata.json": b'{"provider": "hyperv"}', "Virtual Hard Disks/c.vhdx": images["c.vhdx"]}
    for number, files in enumerate((plain, several, virtualbox, hyper_v)):
        for mode in ("w", "w:gz"):
            path = package_files.archive(tmp_path / f"{number}{mode[2:]}.box", files, mode=mode)
            assert read(path, disk=1) == disk
            assert api.package_info(path)["package"] == "box"  # type: ignore[index]
    assert read(tmp_path / "1.box", disk=2) == disk


def test_a_split_vmdk_in_a_box_finds_its_extents_there(disk: bytes, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(disk)
    split = ["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"]
    subprocess.run(["qemu-img", "convert", "-f", "raw", *split, tmp_path / "raw", tmp_path / "d.vmdk"], check=True)
    files = {name: (tmp_path / name).read_bytes() for name in ("d.vmdk", "d-s001.vmdk")}
    for name in files:
        (tmp_path / name).unlink()
    machine = package_files.vmx({"scsi0:0.fileName": "d.vmdk"})
    path = package_files.archive(tmp_path / "x.box", {"metadata.json": b"{}", "x.vmx": machine, **files})
    assert read(path) == disk


def test_a_packed_package_and_packed_files(images: dict[str, bytes], disk: bytes, tmp_path: Path) -> None:
    path = package_files.xva(tmp_path / "x.xva", {"Ref:7": disk})
    (tmp_path / "x.xva.zst").write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
    assert read(tmp_path / "x.xva.zst") == disk
    packed = gzip.compress(images["b.qcow2"])
    descriptor = package_files.ovf(["d"], attributes={"compression": "gzip"})
    assert read(package_files.archive(tmp_path / "g.ova", {"g.ovf": descriptor, "d": packed})) == disk
    for content, more in ((images["b.qcow2"], {}), (packed, {"compression": "gzip"})):
        piece = len(content) // 3 + 1
        attributes = {"chunkSize": str(piece), "size": str(len(content)), **more}
        pieces = {f"d.{number:09}": content[number * piece : (number + 1) * piece] for number in range(3)}
        files = {"c.ovf": package_files.ovf(["d"], attributes=attributes), **pieces}
        assert read(package_files.archive(tmp_path / "c.ova", files)) == disk


def test_a_check_compares_the_digests_of_the_manifest(tapfs: Run, images: dict[str, bytes], tmp_path: Path) -> None:
    files = {name: images[name] for name in ("b.qcow2", "f.img")}
    path = package_files.ova(tmp_path / "x.ova", files)
    assert tapfs("check", "--json", path).code == 0
    content = bytearray(path.read_bytes())
    at = content.index(images["f.img"][:512]) + SIZE // 2
    content[at] ^= 1
    path.write_bytes(content)
    ran = tapfs("check", path)
    assert ran.code == 2
    assert "f.img does not have the SHA256 that x.mf says" in ran.out
    assert "b.qcow2" not in ran.out
    report = api.check(path, disk=1)
    assert not report.corruptions
    without = package_files.archive(tmp_path / "y.ova", {"y.ovf": package_files.ovf(["f.img"]), **files})
    assert tapfs("check", without).code == 63


def test_a_check_finds_a_changed_chunk(tapfs: Run, disk: bytes, tmp_path: Path) -> None:
    path = package_files.xva(tmp_path / "x.xva", {"Ref:7": disk})
    content = bytearray(path.read_bytes())
    content[content.index(disk[:512]) + 1000] ^= 1
    path.write_bytes(content)
    ran = tapfs("check", path)
    assert ran.code == 2
    assert "chunk 0 does not have its checksum" in ran.out
    members = package_files.xva_members("Ref:7", disk)
    del members["Ref:7/00000001"]
    gone = {"ova.xml": package_files.ova_xml({"Ref:7": SIZE}), **members}
    assert "chunk 1 has a checksum, and is missing" in tapfs("check", package_files.archive(path, gone)).out


def test_what_a_descriptor_names_is_confined(images: dict[str, bytes], tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "b.vmdk").write_bytes(images["a.vmdk"])
    for name in ("../b.vmdk", str(tmp_path / "b.vmdk")):
        (inner / "x.ovf").write_bytes(package_files.ovf([name]))
        assert refusal(inner / "x.ovf").kind is ErrorKind.DENIED
        (inner / "x.vmx").write_bytes(package_files.vmx({"scsi0:0.fileName": name}))
        (inner / "x.vbox").write_bytes(package_files.vbox(f'<HardDisk uuid="a" location="{name}"/>', ["a"]))
        for package in ("x.vmx", "x.vbox"):
            assert refusal(inner / package).kind is ErrorKind.DENIED
            assert read(inner / package, backing_root=str(tmp_path))
    (inner / "x.vmx").write_bytes(package_files.vmx({"scsi0:0.fileName": "none.vmdk"}))
    assert "none.vmdk is missing" in str(refusal(inner / "x.vmx"))


def test_packages_of_strangers_are_refused(images: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.ova"
    descriptor, content = package_files.ovf(["d"]), images["b.qcow2"]

    def said(*members: tuple[str, bytes] | tuple[str, bytes, bytes, str]) -> str:
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            package_files.add(tar, "x.ovf", descriptor)
            for member in members:
                package_files.add(tar, *member)
        return str(refusal(path))

    assert "leads out" in said(("../d", content))
    assert "leads out" in said(("/d", content))
    assert "two members of one name" in said(("d", content), ("d", content))
    assert "link or sparse" in said(("d", b"", tarfile.SYMTYPE, "/etc/passwd"))
    assert "link or sparse" in said(("d", b"", tarfile.LNKTYPE, "x.ovf"))
    assert "does not hold" in said(("other", content))
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    descriptor = descriptor.replace(b"?>", b"?>" + bomb, 1)
    assert "document type or entities" in said(("d", content))
    descriptor = b'<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1">' + b"<a>" * 1000
    assert "too many elements" in said(("d", content))


def test_a_sparse_member_is_refused(images: dict[str, bytes], tmp_path: Path) -> None:
    """GNU tar writes holes as a map, so the bytes are not there as they are read."""
    (tmp_path / "x.ovf").write_bytes(package_files.ovf(["d.img"]))
    with (tmp_path / "d.img").open("wb") as file:
        file.truncate(SIZE)
        file.seek(MIB)
        file.write(b"data")
    for kind in ("gnu", "posix"):
        subprocess.run(["tar", "-S", f"--format={kind}", "-cf", "x.ova", "x.ovf", "d.img"], cwd=tmp_path, check=True)
        assert "holds d.img as a link or sparse" in str(refusal(tmp_path / "x.ova"))


def test_a_package_that_was_cut_is_refused(disk: bytes, images: dict[str, bytes], tmp_path: Path) -> None:
    for path in (
        package_files.ova(tmp_path / "x.ova", {"b.qcow2": images["b.qcow2"]}),
        package_files.xva(tmp_path / "x.xva", {"Ref:1": disk}),
    ):
        path.write_bytes(path.read_bytes()[: MIB // 2])
        error = refusal(path)
        assert error.kind is ErrorKind.CORRUPT
        assert error.path == str(path)


def test_a_package_cut_while_it_is_open_is_an_error_and_no_zeros(disk: bytes, tmp_path: Path) -> None:
    path = package_files.archive(tmp_path / "x.ova", {"x.ovf": package_files.ovf(["f.img"]), "f.img": disk})
    with api.open(path) as image, path.open("r+b") as file:
        image.read(0, 512)
        file.truncate(MIB)
        with pytest.raises(ImageError):
            image.read(MIB, 4096)


def test_any_damage_gives_an_error_or_an_image(disk: bytes, images: dict[str, bytes], tmp_path: Path) -> None:
    noise = random.Random(3)
    small = {"b": images["b.qcow2"][: 4 << 10]}
    for path in (
        package_files.ova(tmp_path / "x.ova", small, format=tarfile.PAX_FORMAT),
        package_files.xva(tmp_path / "x.xva", {"Ref:1": disk[:4096]}),
    ):
        content = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(content)
            for _ in range(noise.randrange(1, 4)):
                damaged[noise.randrange(min(len(damaged), 6000))] = noise.randrange(256)
            path.write_bytes(damaged)
            with suppress(ImageError):
                api.package_info(path)


def test_an_ordinary_archive_is_still_no_disk(tmp_path: Path) -> None:
    path = package_files.archive(tmp_path / "x.tar", {"a": b"a", "../b": b"b"})
    assert "is a tar archive, not a disk image" in str(refusal(path))
