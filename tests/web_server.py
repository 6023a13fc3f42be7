"""A small web server for tests, which gives parts of one file, and fails in the ways that it is told."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

#: What a request meets instead of its bytes.
FAULTS = ("500", "503", "cut", "short", "wrong length", "other place", "closed", "late")


class WebServer(ThreadingHTTPServer):
    """Serves `content` under every path. `fault` says of each request which of FAULTS it meets, None: none.

    `etag` goes with every answer. `asked` is the ranges ``[start, stop)`` of all requests for parts.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.files: dict[str, bytes] = {}
        self.etag = '"one"'
        self.ranges = True
        self.asked: list[tuple[int, int]] = []
        self.fault: Callable[[], str | None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that is gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def _list(self) -> None:
        """A bucket's answer to ListObjectsV2: the files of the server whose paths begin with bucket and prefix."""
        place = urlsplit(self.path)
        bucket = place.path.rstrip("/") + "/"
        prefix = bucket + parse_qs(place.query).get("prefix", [""])[0]
        contents = "".join(
            f"<Contents><Key>{escape(unquote(path.removeprefix(bucket)))}</Key><Size>{len(content)}</Size>"
            f"<LastModified>2020-01-01T00:00:00.000Z</LastModified><ETag>{escape(self.server.etag)}</ETag></Contents>"
            for path, content in sorted(self.server.files.items())
            if path.startswith(prefix)
        )
        answer = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            self._list()
            return
        content = self.server.files.get(self.path, self.server.content)
        found = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), min(int(found[2]) + 1, len(content))) if found else (0, len(content))
        self.server.asked.append((start, stop))
        fault = self.server.fault() if stop - start > 1 else None
        data = content[start:stop]
        if fault in {"500", "503"}:
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "closed":
            self.close_connection = True
            return
        if fault == "wrong length":
            data = data[: len(data) // 2]
        if found and self.server.ranges:
            self.send_response(206)
            moved = 1 if fault == "other place" else 0
            self.send_header("Content-Range", f"bytes {start + moved}-{stop - 1 + moved}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "late":
            threading.Event().wait(0.05)
        if fault in {"cut", "short"}:
            self.close_connection = True
            data = data[: len(data) // 2 if fault == "cut" else -1]
        self.wfile.write(data)


@contextmanager
def web_server(content: bytes) -> Generator[WebServer]:
    """A server that runs as long as the block."""
    with WebServer(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
