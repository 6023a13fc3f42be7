"""`python -m tests.bench.slow_server FILE DELAY_SECONDS`: a web server of one file, whose answers begin late.

It prints its port. At the end of its standard input it prints how many bytes and requests it has served.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves parts of a file."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: str, delay_seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.file = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.file).st_size
        self.delay_seconds = delay_seconds
        self.lock = threading.Lock()
        self.served = self.requests = 0


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        time.sleep(self.server.delay_seconds)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        size = self.server.size
        start = int(asked[1]) if asked else 0
        stop = min(int(asked[2]) + 1, size) if asked and asked[2] else size
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
        self.end_headers()
        while body and start < stop:
            sent = os.sendfile(self.connection.fileno(), self.server.file, start, min(stop - start, 1 << 20))
            start += sent
            with self.server.lock:
                self.server.served += sent
        with self.server.lock:
            self.server.requests += 1

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the library's name
        pass


def main() -> int:
    """Serve until nobody is there any more."""
    server = Server(sys.argv[1], float(sys.argv[2]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    print(server.served, server.requests, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
