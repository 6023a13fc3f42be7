"""`python -m tests.bench.remote`: images behind a slow link, beside a plain download and nbdkit's curl plugin.

The link is the loopback of a network namespace of its own: `tc` bounds its rate, and the server answers late. It takes
root. nbdkit reads by its plugin curl under the filters readahead and cache; both serve NBD to `qemu-img bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tapfs
from tests.bench.runner import ROOT, TAPFS

MIB = 1 << 20
INSIDE = "TAPFS_BENCH_NETWORK"


@contextmanager
def served(path: Path, delay_seconds: float) -> Generator[tuple[str, list[int]]]:
    """The address of the file; afterwards the list has the bytes and the requests that were served."""
    words = [sys.executable, "-m", "tests.bench.slow_server", str(path), str(delay_seconds)]
    counted: list[int] = []
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        port = int(server.stdout.readline())
        try:
            yield f"http://127.0.0.1:{port}/{path.name}", counted
        finally:
            server.stdin.close()
            counted += map(int, server.stdout.read().split())


@contextmanager
def exported(words: Sequence[str | Path], socket: Path) -> Generator[str]:
    """The address of an NBD server that a command starts on a socket."""
    socket.unlink(missing_ok=True)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as server:
        while not socket.exists():
            assert server.poll() is None, words
            time.sleep(0.01)
        try:
            yield f"nbd+unix:///?socket={socket}"
        finally:
            server.terminate()


def took(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def run(*words: str | Path) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def download(url: str) -> None:
    """All of a file by one request."""
    with urllib.request.urlopen(url) as answer:  # noqa: S310  our own server
        while answer.read(MIB):
            pass


class Bench:
    """The rows, in a folder."""

    def __init__(
        self, folder: Path, *, rate_mbit: int, delay_ms: float, rounds: int, size_mib: int, nbdkit: str
    ) -> None:
        self.folder = folder
        self.rate = rate_mbit * 1_000_000 / 8
        self.delay = delay_ms / 1000
        self.rounds = rounds
        self.size_mib = size_mib
        self.nbdkit = nbdkit

    def info(self) -> dict[str, object]:
        """`tapfs info` of a qcow2 image of 100 GiB with all of its tables, and an ext4 file system in a partition."""
        image, plain = self.folder / "large.qcow2", self.folder / "large.raw"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, "100G")
        with plain.open("wb") as file:
            file.truncate(100 << 30)
        subprocess.run(["sfdisk", "-q", plain], input=b"label: gpt\nstart=1MiB\n", check=True)
        run("mkfs.ext4", "-q", "-E", "offset=1048576,nodiscard", plain, str((100 << 20) - 4096))
        with tapfs.open(plain, format="raw") as source, tapfs.open(image, writable=True) as disk:
            for each in source.extents():
                for offset in range(each.offset, each.end, MIB) if each.data else ():
                    disk.write(offset, source.read(offset, min(MIB, each.end - offset)))
        with served(image, self.delay) as (url, counted):
            seconds = took(lambda: run(TAPFS, "info", url))
        return {"row": "info of a 100 GiB qcow2", "bytes": counted[0], "requests": counted[1], "seconds": seconds}

    def convert(self) -> dict[str, object]:
        """`tapfs convert` of a qcow2 image, beside one plain request for the file."""
        raw, image = self.folder / "noise.raw", self.folder / "noise.qcow2"
        noise = random.Random(1)
        raw.write_bytes(b"".join(noise.randbytes(MIB) for _ in range(self.size_mib)))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
        size = image.stat().st_size
        out = Path("/dev/shm") / f"tapfs-bench-{os.getpid()}.raw"  # noqa: S108  the disk is not what is measured
        plain: list[float] = []
        ours: list[float] = []
        for _ in range(self.rounds):
            with served(image, self.delay) as (url, _):
                plain.append(took(lambda url=url: download(url)))  # type: ignore[misc]
                ours.append(took(lambda url=url: run(TAPFS, "convert", "-O", "raw", url, out)))  # type: ignore[misc]
        run("cmp", raw, out)
        out.unlink()
        first, second = statistics.median(plain), statistics.median(ours)
        return {
            "row": "sequential convert",
            "download_mb_s": size / first / 1e6,
            "convert_mb_s": size / second / 1e6,
            "of_link": size / second / self.rate,
            "of_download": first / second,
        }

    def random_reads(self, *, span: int = 32 * MIB, count: int = 2000) -> dict[str, object]:
        """Reads of 4 KiB all over the first `span` bytes, one after the other and eight at once."""
        raw = self.folder / "noise.raw"
        found: dict[str, object] = {"row": f"{count} random reads of 4 KiB in {span // MIB} MiB"}
        piece = self.folder / "piece.raw"
        with raw.open("rb") as source:
            piece.write_bytes(source.read(span))
        socket = self.folder / "s"
        step = 4096 * 2654435  # odd in pages, so that it goes all over the span
        for depth in (1, 8):
            for name in ("tapfs", "nbdkit"):
                seconds: list[float] = []
                sent = 0
                for _ in range(self.rounds):
                    with served(piece, self.delay) as (url, counted):
                        command: list[str | Path] = [TAPFS, "serve", "-f", "raw", "--socket", socket, url]
                        if name == "nbdkit":
                            filters = ["--filter=readahead", "--filter=cache"]
                            command = [self.nbdkit, "-f", "-r", "-U", socket, *filters, "curl", f"url={url}"]
                        with exported(command, socket) as address:
                            words = ["-c", str(count), "-d", str(depth), "-s", "4096", "-S", str(step % span)]
                            bench = ["qemu-img", "bench", "-q", "-f", "raw", *words, address]
                            seconds.append(took(lambda bench=bench: run(*bench)))  # type: ignore[misc]
                    sent = counted[0]
                found[f"{name}_depth_{depth}"] = {"reads_s": count / statistics.median(seconds), "bytes": sent}
        return found


def main() -> int:
    """Measure, in a network namespace."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.remote", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=400, metavar="MBIT", help="of the link (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=20, metavar="MS", help="of each answer (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="of the image (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    rows = ["info", "convert", "random_reads"]
    parser.add_argument("--only", nargs="+", choices=rows, default=rows)
    arguments = parser.parse_args()
    if INSIDE not in os.environ:
        link = f"tc qdisc add dev lo root tbf rate {arguments.rate}mbit burst 256kb latency 200ms"
        inner = [
            "sh",
            "-c",
            f'ip link set lo up && {link} && exec "$@"',
            "sh",
            sys.executable,
            "-m",
            "tests.bench.remote",
        ]
        words = ["unshare", "--net", *inner, *sys.argv[1:]]
        return subprocess.run(words, check=False, cwd=ROOT, env=os.environ | {INSIDE: "1"}).returncode
    nbdkit = os.environ.get("NBDKIT") or shutil.which("nbdkit") or "nbdkit"
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-", dir="/var/tmp") as folder:
        bench = Bench(
            Path(folder),
            rate_mbit=arguments.rate,
            delay_ms=arguments.delay,
            rounds=arguments.rounds,
            size_mib=arguments.size,
            nbdkit=nbdkit,
        )
        rows = [getattr(bench, name)() for name in arguments.only]
    text = json.dumps({"rate_mbit": arguments.rate, "delay_ms": arguments.delay, "rows": rows}, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
