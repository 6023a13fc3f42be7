"""`tapfs stats --prometheus`: text that Prometheus' own parser reads, in a file that is replaced whole, and by HTTP."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tapfs.cli.measuring import Measured
from tapfs.cli.prometheus_text import exposition
from tapfs.kernel.metrics import BOUNDS_NS, NONE, Metric, as_data

Run = Callable[..., Any]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> dict[str, tuple[str, Samples]]:
    """Type and samples of each family, by the parser of Prometheus' client."""
    found: dict[str, tuple[str, Samples]] = {}
    for family in text_string_to_metric_families(text):
        samples = {(each.name, frozenset(each.labels.items())): each.value for each in family.samples}
        assert len(samples) == len(family.samples)
        assert family.documentation
        found[family.name] = (family.type, samples)
    return found


def disk(**changes: Any) -> Measured:
    facts: dict[str, Any] = {
        "door": "nbd",
        "place": ("-", "nbd+unix:///?socket=/s"),
        "disk": "nbd+unix:///?socket=/s",
        "image": "/disk.qcow2",
        "format": "qcow2",
        "data": {},
        "up": True,
    }
    return Measured(**facts | changes)


def test_what_was_counted_is_read_by_prometheus() -> None:
    buckets = (3, *[0] * (len(BOUNDS_NS) - 2), 2, 1)
    operations = as_data({**NONE, "write": Metric(1, 4096, 3 * 10**9, buckets)})
    statistics = {"cache_hits": 7, "parked": 5, "throttled_ns": 500_000_000, "in_flight": 2, "unknown": 3}
    found = parsed(exposition([disk(clients=2, size=512, statistics=statistics, operations=operations)], "1.2"))
    labels = frozenset(
        {"door": "nbd", "disk": "nbd+unix:///?socket=/s", "image": "/disk.qcow2", "format": "qcow2"}.items()
    )
    write = labels | {("operation", "write")}
    assert found["tapfs_build_info"][1] == {("tapfs_build_info", frozenset({("version", "1.2")})): 1}
    assert found["tapfs_up"] == ("gauge", {("tapfs_up", labels): 1})
    assert found["tapfs_clients"] == ("gauge", {("tapfs_clients", labels): 2})
    assert found["tapfs_disk_size_bytes"][1] == {("tapfs_disk_size_bytes", labels): 512}
    assert found["tapfs_map_cache_hits"] == ("counter", {("tapfs_map_cache_hits_total", labels): 7})
    assert found["tapfs_throttled_seconds"][1] == {("tapfs_throttled_seconds_total", labels): 0.5}
    assert found["tapfs_requests_in_flight"] == ("gauge", {("tapfs_requests_in_flight", labels): 2})
    assert found["tapfs_requests"][1]["tapfs_requests_total", write] == 6
    assert found["tapfs_request_errors"][1]["tapfs_request_errors_total", write] == 1
    assert found["tapfs_request_bytes"][1]["tapfs_request_bytes_total", write] == 4096
    kind, samples = found["tapfs_request_duration_seconds"]
    name = "tapfs_request_duration_seconds"
    assert kind == "histogram"
    assert samples[f"{name}_sum", write] == 3
    assert samples[f"{name}_count", write] == 6
    assert samples[f"{name}_bucket", write | {("le", "2.56e-07")}] == 3
    assert samples[f"{name}_bucket", write | {("le", str(BOUNDS_NS[-1] / 10**9))}] == 5
    assert samples[f"{name}_bucket", write | {("le", "+Inf")}] == 6
    # Of what nothing is known there is no family.
    assert "tapfs_held_bytes" not in found


def test_any_name_of_a_file_is_a_label() -> None:
    name = '/srv/a "b"\\c\n\udcff{}é'
    found = parsed(exposition([disk(image=name, up=False), disk(disk="other")], "1"))
    labels = {dict(labels)["image"]: value for (_, labels), value in found["tapfs_up"][1].items()}
    assert sorted(labels.values()) == [0, 1]
    assert any(each.startswith('/srv/a "b"') for each in labels)
    assert "tapfs_requests" not in found


@pytest.fixture
def _nothing_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TAPFS_XEN_MACHINE", str(tmp_path / "none"))


@pytest.mark.usefixtures("_nothing_in_use")
def test_the_file_of_a_collector_is_replaced_whole(tapfs: Run, tmp_path: Path) -> None:
    target = tmp_path / "tapfs.prom"
    target.write_text("before")
    with target.open() as held:
        assert tapfs("stats", "--prometheus", "--output", target).code == 0
        assert held.read() == "before"
    assert "tapfs_build_info" in parsed(target.read_text())
    assert target.read_text() == tapfs("stats", "--prometheus").out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tapfs.prom"]
    failed = tapfs("stats", "--prometheus", "--output", tmp_path / "missing" / "tapfs.prom")
    assert failed.code != 0
    assert str(tmp_path / "missing" / "tapfs.prom") in failed.err
    assert tapfs("stats", "--output", "json").out == "[]\n"
    for words in (
        ("--output", target),
        ("--listen", ":1"),
        ("--prometheus", "--json"),
        ("--prometheus", "--listen", "x"),
    ):
        assert tapfs("stats", *words).code == 64


@contextmanager
def listening(command: list[str], where: str) -> Generator[tuple[subprocess.Popen[str], str]]:
    words = [*command, "stats", "--prometheus", "--listen", where]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.usefixtures("_nothing_in_use")
def test_a_scraper_asks_by_http(tapfs_command: list[str], tmp_path: Path) -> None:
    with listening(tapfs_command, "127.0.0.1:0") as (process, place):
        port = int(place.removeprefix("http://127.0.0.1:").removesuffix("/metrics"))
        for method, path, status in (("GET", "/metrics", 200), ("GET", "/", 404), ("POST", "/metrics", 405)):
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            client.request(method, path, headers={"Accept": "text/plain"})
            answer = client.getresponse()
            assert answer.status == status
            text = answer.read().decode()
            assert status != 200 or "tapfs_build_info" in parsed(text)
        for garbage in (b"", b"\0" * 20000, b"GET\r\n\r\n", b"\xff / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), 30) as client_of_garbage:
                client_of_garbage.sendall(garbage)
                client_of_garbage.shutdown(socket.SHUT_WR)
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        client.request("HEAD", "/metrics")
        assert client.getresponse().status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    path = tmp_path / "metrics.sock"
    with listening(tapfs_command, str(path)) as (process, place):
        assert place == str(path)
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(30)
            asking.connect(str(path))
            asking.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            answered = b"".join(iter(lambda: asking.recv(65536), b""))
        assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
        process.send_signal(signal.SIGINT)
        process.wait(30)
        assert not path.exists()
