"""Clusters: the throughput of one and of two workers here, what a task costs the scheduler, and a simulation to 200.

`make bench-cluster`. The simulation has a scheduler that does one thing at a time, for the measured seconds a task, and
workers that take the measured seconds an image. The sizes of batches are those of `tapfs.many.cluster`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tapfs.many.cluster import Batches
from tests.conftest import REPOSITORY

#: Images of 2 MiB that are hashed for the throughput, and empty tasks for the cost of one.
IMAGES, TASKS = 400, 2000

WORKERS = (1, 2, 5, 10, 20, 50, 100, 200)


@contextmanager
def program(module: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of Dask's programs."""
    command = [sys.executable, "-m", f"distributed.cli.{module}", *words, "--no-dashboard"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def processor_seconds(pid: int) -> float:
    """What a process has used of processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def throughput(folder: Path, address: str) -> float:
    """Images a second of a survey that hashes, start and end of the command left out by a second, empty survey."""
    words = [str(Path(sys.executable).parent / "tapfs"), "survey", "--hash", "--scheduler", address, "--to", "jsonl"]
    taken: list[float] = []
    for place in (folder / "none", folder):
        started = time.monotonic()
        subprocess.run([*words, str(place)], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.monotonic() - started)
    return IMAGES / max(taken[1] - taken[0], 1e-3)


def cost_of_a_task(address: str, scheduler: int) -> float:
    """The scheduler's processor seconds for a task of one image that costs a worker nothing."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.gather(client.map(str, range(100), pure=False))
        before = processor_seconds(scheduler)
        client.gather(client.map(str, range(TASKS), pure=False))
        return (processor_seconds(scheduler) - before) / TASKS


def simulated(workers: int, images: int, image_seconds: float, task_seconds: float, *, batched: bool) -> float:
    """Images a second of so many workers."""
    batches = Batches(workers)
    batches.note(1, image_seconds)
    left, clock, scheduler_free = images, 0.0, 0.0
    idle = [(0.0, number) for number in range(workers)]
    heapq.heapify(idle)
    while left:
        free, number = heapq.heappop(idle)
        size = batches.size(left) if batched else 1
        left -= size
        scheduler_free = max(scheduler_free, free) + task_seconds
        end = scheduler_free + size * image_seconds
        clock = max(clock, end)
        heapq.heappush(idle, (end, number))
    return images / clock


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--image-seconds", type=float, nargs="*", default=[0.0003, 0.02, 2.0])
    arguments = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "none").mkdir()
        block = os.urandom(1 << 20)
        for number in range(IMAGES):
            head = bytearray(512)
            head[446 + 4], head[446 + 8], head[446 + 12 : 446 + 14], head[510:] = 0x83, 1, b"\0\x0f", b"\x55\xaa"
            (folder / f"{number}.raw").write_bytes(bytes(head) + block + block[512:])
        said = folder / "scheduler.json"
        words = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(said))
        scheduler = stack.enter_context(program("dask_scheduler", *words))
        while not said.exists():
            time.sleep(0.05)
        address = json.loads(said.read_text())["address"]
        worker = ("--scheduler-file", str(said), "--nthreads", "1", "--no-nanny", "--memory-limit", "0")
        rates: list[float] = []
        for count in (1, 2):
            stack.enter_context(program("dask_worker", *worker))
            throughput(folder, address)  # its process starts
            rates.append(max(throughput(folder, address) for _ in range(2)))
            print(f"{count} worker{'s' if count > 1 else ''}: {rates[-1]:.0f} images/s hashed (2 MiB each)")
        task = cost_of_a_task(address, scheduler.pid)
    print(f"from 1 to 2 workers: {rates[1] / rates[0]:.2f}x")
    print(f"a task costs the scheduler {task * 1e3:.2f} ms of processor time")
    results |= {"images_a_second": rates, "task_seconds": task, "simulated": {}}
    for seconds in arguments.image_seconds:
        images = max(2000, min(2_000_000, int(200 * 60 / seconds)))
        print(f"simulated, an image takes {seconds * 1e3:g} ms ({images} images): images/s, of the ideal; one by one")
        for count in WORKERS:
            batched = simulated(count, images, seconds, task, batched=True)
            single = simulated(count, min(images, 200_000), seconds, task, batched=False)
            share = batched * seconds / count
            print(f"  {count:4} workers {batched:10.0f}  {share:5.0%}   {single:10.0f}")
            results["simulated"][f"{seconds}/{count}"] = [batched, single]  # type: ignore[index]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
