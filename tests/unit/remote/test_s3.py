"""Images in an S3 store that others wrote (moto's): what is there is read, and what is not, or has changed, is told."""

from __future__ import annotations

import http.client
import random
from collections.abc import Iterator

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

import tapfs
from tapfs import ErrorKind, ImageError

SIZE = 3 << 20


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """A bucket, at the endpoint that the environment names."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = http.client.HTTPConnection(host, port, timeout=30)
    client.request("PUT", "/bucket")
    assert client.getresponse().status == 200
    client.close()
    try:
        yield S3Store.from_url("s3://bucket", client_options={"allow_http": True})
    finally:
        server.stop()


def test_an_object_is_read_until_it_changes(bucket: S3Store) -> None:
    content = random.Random(7).randbytes(SIZE)
    obstore.put(bucket, "dir/a disk.raw", content)
    with tapfs.open("s3://bucket/dir/a%20disk.raw", format="raw") as disk:
        assert disk.size == SIZE
        assert disk.read(SIZE - 100, 100) == content[-100:]
    with pytest.raises(ImageError, match="no such object") as raised:
        tapfs.open("s3://bucket/dir/none", format="raw")
    assert raised.value.kind is ErrorKind.NOT_FOUND
    with tapfs.open("s3://bucket/dir/a%20disk.raw", format="raw") as disk:
        obstore.put(bucket, "dir/a disk.raw", content[::-1])
        with pytest.raises(ImageError, match="has changed since it was opened"):
            disk.read(SIZE - 100, 100)
