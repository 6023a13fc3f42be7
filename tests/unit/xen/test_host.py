"""Find out whether this machine is a Xen host, and its xenstore."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen import host
from tapfs.xen.host import Host, find_host


@pytest.fixture
def domain_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a control domain has in /dev/xen, /proc/xen and /run."""
    for name in ("gntdev", "evtchn", "xenbus", "socket"):
        (tmp_path / name).touch()
    (tmp_path / "capabilities").write_text("control_d\n")
    monkeypatch.delenv("TAPFS_XEN_MACHINE", raising=False)
    monkeypatch.delenv("XENSTORED_PATH", raising=False)
    monkeypatch.setattr(host, "_DIRECTORIES", (str(tmp_path),))
    monkeypatch.setattr(host, "_DEVICES", {str(tmp_path / name): f"xen-{name}" for name in ("gntdev", "evtchn")})
    monkeypatch.setattr(host, "_CAPABILITIES", str(tmp_path / "capabilities"))
    monkeypatch.setattr(host, "_SOCKET", str(tmp_path / "socket"))
    monkeypatch.setattr(host, "_XENBUS", str(tmp_path / "xenbus"))
    return tmp_path


def test_the_socket_the_device_and_what_the_user_says(domain_0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_host() == Host(str(domain_0 / "socket"))
    (domain_0 / "socket").unlink()
    assert find_host() == Host(str(domain_0 / "xenbus"))
    monkeypatch.setenv("XENSTORED_PATH", "/elsewhere")
    assert find_host() == Host("/elsewhere")


def test_a_simulated_machine_goes_before_all(domain_0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_DIRECTORIES", ())
    monkeypatch.chdir(domain_0)
    monkeypatch.setenv("TAPFS_XEN_MACHINE", "machine")
    directory = str(domain_0 / "machine")
    assert find_host() == Host(f"{directory}/xenstored.socket", directory)


def test_xenfs_need_not_be_mounted(domain_0: Path) -> None:
    (domain_0 / "capabilities").unlink()
    assert find_host() == Host(str(domain_0 / "socket"))


def refusal() -> str:
    with pytest.raises(ImageError) as raised:
        find_host()
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    return str(raised.value)


def test_no_xen(domain_0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_DIRECTORIES", (str(domain_0 / "none"),))
    assert refusal() == "this machine does not run Xen; `tapfs mount` shows what is in an image anywhere"


def test_a_guest_of_xen(domain_0: Path) -> None:
    (domain_0 / "capabilities").write_text("")
    (domain_0 / "gntdev").unlink()
    assert refusal() == (
        "this is a guest of Xen, not its control domain; run tapfs in domain 0; "
        "if this is a driver domain: modprobe -a xen-gntdev xen-evtchn"
    )


def test_a_driver_domain(domain_0: Path) -> None:
    (domain_0 / "capabilities").write_text("")
    (domain_0 / "socket").unlink()
    assert find_host() == Host(str(domain_0 / "xenbus"))


def test_a_missing_driver(domain_0: Path) -> None:
    (domain_0 / "evtchn").unlink()
    assert refusal() == f"{domain_0}/evtchn: is missing; modprobe xen-evtchn"


def test_no_xenstored(domain_0: Path) -> None:
    (domain_0 / "socket").unlink()
    (domain_0 / "xenbus").unlink()
    assert refusal() == f"{domain_0}/socket: no xenstored runs; start Xen's services (xencommons)"
