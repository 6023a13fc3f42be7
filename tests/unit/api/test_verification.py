"""Sidecars and damaged files from Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import tapfs
from tapfs.serving.scrubbing import scrub_step


def test_a_disk_is_hashed_and_verified(tmp_path: Path, sample: Path) -> None:
    image = tmp_path / "disk.qcow2"
    tapfs.convert(sample, image, format="raw", target_format="qcow2")
    hashed = tapfs.write_sidecar(image, leaf_bytes=4096)
    assert tapfs.verify(image, root=hashed.root).verdict is tapfs.Verdict.SAME
    assert tapfs.verify(sample, f"{image}.tapfs-hash", format="raw").verdict is tapfs.Verdict.SAME
    with tapfs.open(image, writable=True) as disk:
        disk.write(8192, b"other")
        found = tapfs.verify(disk)
    assert (found.verdict, found.differing) == (tapfs.Verdict.CHANGED, [(8192, 4096)])
    with pytest.raises(tapfs.ImageError, match="another disk"):
        tapfs.verify(image, root=bytes(32))


def test_a_disk_of_a_package_has_the_sidecar_that_the_command_makes(
    tmp_path: Path, sample: Path, tapfs_command: list[str]
) -> None:
    """Also where a server looks for it (`scrub --mounted`)."""
    lines = ['virtualHW.version = "8"']
    for number, name in enumerate(("a.vmdk", "b.vmdk")):
        tapfs.convert(sample, tmp_path / name, format="raw", target_format="vmdk")
        lines.append(f'scsi0:{number}.fileName = "{name}"')
    (tmp_path / "vm.vmx").write_text("\n".join(lines))
    subprocess.run([*tapfs_command, "hash", "--disk", "2", tmp_path / "vm.vmx"], capture_output=True, check=True)
    with tapfs.open(tmp_path / "vm.vmx", disk=2) as disk:
        assert tapfs.verify(disk).verdict is tapfs.Verdict.SAME
        assert scrub_step(disk, 0, None)["sidecar"] == str(tmp_path / "vm.vmx.disk2.tapfs-hash")
    with tapfs.open(tmp_path / "vm.vmx", disk=1) as disk:
        tapfs.write_sidecar(disk)
    assert {each.name for each in tmp_path.glob("*.tapfs-hash")} == {f"vm.vmx.disk{n}.tapfs-hash" for n in (1, 2)}


def test_ranges_in_no_file_system_are_in_no_file(sample: Path) -> None:
    (part,) = tapfs.damaged_files(sample, [(0, 512)], format="raw")
    assert (part.partition, part.type, part.found.unowned) == (None, None, [(0, 512)])
