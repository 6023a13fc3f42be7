"""One boot under QEMU's emulation: of Xen and dom0, or of a newer Linux alone."""

from __future__ import annotations

import os
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.laboratory.build import Lab
from tests.laboratory.vhost_disk import VhostDisk

DOM0_MEMORY = "640M"
# On a busy machine an emulated timer may tick so late that Linux takes it for one that is not connected, and panics.
LATE_TIMER = "no_timer_check"
LINUX = "rdinit=/init panic=-1 mitigations=off nokaslr loglevel=4"
# With SMAP dom0 dies early under emulation, with RDTSCP PVH guests do. With XSAVE, and so AVX, a program in a guest
# that uses vector registers crashes once in a few dozen runs (QEMU 7.2, no block device needed). With ERMS and FSRM the
# kernel and the C library copy by `rep movsb`, and the emulation does that byte by byte: a copy then costs eight times
# as much as one of blkback, which goes by words whatever the processor is.
PROCESSOR = "max,-smap,-rdtscp,-xsave,-erms,-fsrm"
# Eight nanoseconds an instruction, and no waiting for an idle processor's next timer.
COUNTED_CLOCK = "shift=3,sleep=off,align=off"
# Linux 7 takes carry-less multiplication for a sign that there is AVX, and dies when it tries its ciphers.
NO_AVX = ",-pclmulqdq"


class Ran(NamedTuple):
    """A boot that is over: what went wrong if it did, and how long a processor of the host had to do with it."""

    problem: str | None
    processor_seconds: float


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine to boot. `share` is the host's folder that dom0 has at /share.

    `kernel`: "newer" or "newest", without Xen. `by_instructions`: its clock goes by the instructions that it executes.
    """

    lab: Lab
    payload: Path
    share: Path
    serial: Path
    kernel: str | None = None
    dom0_processors: int = 1
    memory_mebibytes: int = 1408
    by_instructions: bool = False

    def run(self, time_limit: float) -> Ran:
        """Boot, and wait until dom0 powers off."""
        if self.kernel is None:
            return self._run(time_limit, self._built())
        with VhostDisk(self.serial.parent, self.share) as disk:
            ran = self._run(time_limit, disk.options(self.memory_mebibytes))
        return ran._replace(problem=ran.problem or disk.problem())

    def _run(self, time_limit: float, more: list[str]) -> Ran:
        with self.serial.with_name("qemu.log").open("wb") as log:
            process = subprocess.Popen([*self._command(), *more], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        begin = time.monotonic()
        try:
            ended = _ends(process.pid, time_limit)
            seconds = _processor_seconds(process.pid)
        finally:
            process.kill()
            status = process.wait()
        problem = None
        if not ended:
            problem = f"the machine was still running after {time.monotonic() - begin:.0f} s"
        elif status != 0:
            said = self.serial.with_name("qemu.log").read_text()[-500:].strip()
            problem = f"QEMU ended with status {status}: {said}"
        return Ran(problem, seconds)

    def _command(self) -> list[str]:
        processor = PROCESSOR + (NO_AVX if self.kernel == "newest" else "")
        # fmt: off
        return [
            "setpriv", "--pdeathsig", "KILL",  # whoever ends this process ends its machines
            "qemu-system-x86_64", "-M", "q35", *self._clock(), "-cpu", processor,
            "-m", str(self.memory_mebibytes), "-no-reboot",
            "-net", "none", "-display", "none", "-monitor", "none", "-serial", f"file:{self.serial}",
            *(self._xen() if self.kernel is None else self._linux(self.kernel)),
            "-drive", f"file={self.lab.root},if=none,id=root,format=raw,cache=unsafe,snapshot=on",
            "-device", "virtio-blk-pci,drive=root",
            "-drive", f"file={self.payload},if=none,id=payload,format=raw,cache=unsafe,readonly=on",
            "-device", "virtio-blk-pci,drive=payload",
            "-virtfs", f"local,path={self.share},mount_tag=share,security_model=none",
        ]
        # fmt: on

    def _clock(self) -> list[str]:
        if self.by_instructions:
            return ["-accel", "tcg,thread=single", "-icount", COUNTED_CLOCK]
        return ["-accel", "tcg,thread=multi"]

    def _built(self) -> list[str]:
        """The root file system as it was built, for a driver domain."""
        drive = f"file={self.lab.root},if=none,id=built,format=raw,cache=unsafe,readonly=on"
        return ["-drive", drive, "-device", "virtio-blk-pci,drive=built"]

    def _linux(self, name: str) -> list[str]:
        """Two processors, so that a block device has two queues."""
        linux = f"console=ttyS0 {LINUX} {LATE_TIMER} lab_init=init-host"
        kernel, initramfs = self.lab.host(name)
        return ["-smp", "2", "-kernel", str(kernel), "-append", linux, "-initrd", str(initramfs)]

    def _xen(self) -> list[str]:
        lab = self.lab
        xen = (
            f"console=com1 com1=115200,8n1 dom0=pv dom0_max_vcpus={self.dom0_processors} "
            f"dom0_mem={DOM0_MEMORY},max:{DOM0_MEMORY} "
            "loglvl=warning guest_loglvl=warning"
        )
        initrd = f"{lab.kernel} console=hvc0 {LINUX},{lab.initramfs}"
        return ["-smp", "1", "-kernel", str(lab.hypervisor), "-append", xen, "-initrd", initrd]


def _ends(pid: int, seconds: float) -> bool:
    """Wait for the end of a process, which stays there to be looked at; False: it goes on."""
    descriptor = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(descriptor)


def _processor_seconds(pid: int) -> float:
    """What a process has used, all of its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
