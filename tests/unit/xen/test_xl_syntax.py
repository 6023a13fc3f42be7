"""The disks of xl's configurations."""

from __future__ import annotations

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.specification import DiskSpecification
from tapfs.xen.toolstack.xl_syntax import parse_disk


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("vdev=xvda,target=/x", DiskSpecification("/x", vdev=51712)),
        ("vdev=xvda,access=ro,target=/x", DiskSpecification("/x", vdev=51712, mode="r")),
        ("format=qcow,vdev=xvda,access=rw,target=/a,b", DiskSpecification("/a,b", "qcow", vdev=51712, mode="w")),
        ("target=/x,vdev=xvda", DiskSpecification("/x,vdev=xvda")),
        (
            "vdev=xvdh,access=ro,script=block-tapfs,target=tap:qcow:/x",
            DiskSpecification("/x", "qcow", False, 51824, "r"),
        ),
        ("vdev=hdc,devtype=cdrom,target=/x.iso", DiskSpecification("/x.iso", vdev=5632, mode="r")),
        ("vdev=hdc,cdrom,access=rw,target=/x.iso", DiskSpecification("/x.iso", vdev=5632, mode="r")),
        ("vdev=xvda,discard,backendtype=phy,backend=0,target=ram:x", DiskSpecification("ram:x", vdev=51712)),
        # Everything else is what it is without xl.
        ("tap:qcow:/x,xvda,w", DiskSpecification("/x", "qcow", vdev=51712, mode="w")),
        ("/a=b", DiskSpecification("/a=b")),
        ("./vdev=xvda", DiskSpecification("./vdev=xvda")),
    ],
)
def test_what_xl_says(text: str, meant: DiskSpecification) -> None:
    assert parse_disk(text) == meant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vdev=xvda", "names no file"),
        ("vdev=xvda,target=", "names no file"),
        ("format=empty,vdev=hdc,target=/x", "has no target"),
        ("vdev=xvda,format=raw,target=tap:qcow:/x", "format raw and a target of the format qcow"),
        ("vdev=xvda,script=block-iscsi,target=/x", "script=block-iscsi; leave that out"),
        ("vdev=xvda,backendtype=qdisk,target=/x", "backendtype=qdisk; leave that out"),
        ("vdev=xvda,backend=stubdom,target=/x", "domain stubdom"),
        ("vdev=xvda,colo,target=/x", "'colo' is nothing that tapfs knows"),
        ("other=x,target=/x", "'other=x' is nothing that tapfs knows"),
        ("vdev=xvda,/x", "'/x' is nothing that tapfs knows"),
        ("vdev=nonsense,target=/x", "nonsense"),
        ("vdev=xvda,access=all,target=/x", "is no mode"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as raised:
        parse_disk(text)
    assert raised.value.kind is ErrorKind.INVALID_ARGUMENT
