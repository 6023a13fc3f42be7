"""A root whose systemd has booted: the first process of namespaces of its own, in the kernel of this machine.

A script is its only unit besides what the root has. When the script ends systemd stops all other units and exits with
the code of the script, as a machine that is shut down does. The root sees no disk of this machine, and cannot set its
clock, load modules or change what is below /proc/sys.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Minutes and more: under load a Python starts in seconds.
_PATIENCE_SECONDS = 900

_TRIAL = """\
[Unit]
Description=The script that is tried
SuccessAction=exit
FailureAction=exit

[Service]
Type=oneshot
ExecStart=/bin/sh -eux /trial/script
ExecStopPost=/bin/sh -c 'journalctl --no-pager --boot > /trial/journal'
StandardOutput=file:/trial/output
StandardError=inherit
"""

#: Joins a group of processes of its own, whose root the namespaces see, and takes it away at the end.
_GROUPED = r"""
set -eu
root=$1 group=$root/mnt/tapfs-booted-$$ inner=$2
mount -t cgroup2 cgroup2 "$root/mnt"
mkdir "$group"
code=0
sh -euc 'echo $$ > "$1/cgroup.procs"; shift
    exec unshare --cgroup --mount --uts --ipc --net --pid --fork --kill-child sh -euc "$@"' \
    sh "$group" "$inner" sh "$root" || code=$?
find "$group" -depth -type d -exec rmdir {} \;
umount "$root/mnt"
exit $code
"""

#: Makes the root what a container is, and hands over to systemd.
_CONTAINED = r"""
cd "$1"
umount mnt
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys  # so that udev leaves this machine's devices alone
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for node in null zero full random urandom tty fuse loop-control loop0 loop1 loop2 loop3 loop4 loop5 loop6 loop7; do
    : > dev/$node
    mount --bind /dev/$node dev/$node
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
pivot_root . mnt
cd /
umount --lazy /mnt
for lacking in sys_time sys_module sys_rawio syslog mknod; do bound=${bound:+$bound,}-$lacking; done
exec env -i container=tapfs PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
    setpriv --bounding-set "$bound" --inh-caps "$bound" /usr/lib/systemd/systemd --unit=multi-user.target
"""


def run_booted(root: Path, script: str) -> str:
    """Boot the root, run the script there, and shut down: what the script has said. Ends this process if it fails."""
    trial, units = root / "trial", root / "etc/systemd/system"
    trial.mkdir()
    (trial / "script").write_text(script)
    (units / "trial.service").write_text(_TRIAL)
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/trial.service").symlink_to("../trial.service")
    for name in ("console-getty.service", "getty.target", "systemd-firstboot.service"):
        (units / name).symlink_to("/dev/null")
    (root / "etc/machine-id").write_text("")
    unshared = ["unshare", "--mount", "setpriv", "--pdeathsig", "KILL", "sh", "-c", _GROUPED, "sh", root, _CONTAINED]
    try:
        done = subprocess.run(
            unshared,
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_PATIENCE_SECONDS,
        )
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, said = "no exit code", (error.stdout or b"").decode(errors="replace")
    output, journal = (
        (path.read_text(errors="replace") if path.exists() else "") for path in (trial / "output", trial / "journal")
    )
    if code != 0:
        sys.exit(f"{script}\nended with {code}:\n{said[-3000:]}\n{journal[-4000:]}\n{output[-6000:]}")
    return output
