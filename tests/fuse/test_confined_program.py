"""A FUSE program in its sandbox: one that is evil on purpose gets nowhere, and mounts once, where it is to."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tapfs.fuse.files.confined_program import ProgramCall
from tapfs.fuse.mount_table import mounted_file_systems, unmount
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("root")

#: Says what it could do. Words: what it reads, a folder, a file elsewhere, a process.
_EVIL = r"""
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int opens(const char *path, int flags) { return open(path, flags, 0600) >= 0; }
static int forks(void) {
    int child = fork();
    if (child == 0) { _exit(0); }
    return child > 0;
}
static int mounts(const char *target, const char *kind) {
    char options[80];
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other",
             open("/dev/fuse", O_RDWR));
    return mount("source", target, kind, 0, options) == 0;
}
#define TRY(name, what) do { if (what) { puts(name); } } while (0)
int main(int count, char **words) {
    const char *node = words[1], *folder = words[2], *elsewhere = words[3];
    int process = count > 4 ? atoi(words[4]) : 0;
    char path[4096];
    snprintf(path, sizeof path, "%s/new", folder);
    TRY("read", opens(node, O_RDONLY));
    TRY("write", opens(node, O_RDWR));
    TRY("a secret", opens("/etc/shadow", O_RDONLY));
    TRY("elsewhere", opens(elsewhere, O_RDONLY));
    TRY("a new file", opens(path, O_RDWR | O_CREAT));
    TRY("a mode", chmod(elsewhere, 0777) == 0);
    TRY("a socket", socket(AF_UNIX, SOCK_STREAM, 0) >= 0 || socket(AF_INET, SOCK_STREAM, 0) >= 0);
    TRY("a process", forks());
    TRY("tracing", ptrace(PTRACE_SEIZE, process, 0, 0) == 0);
    TRY("a signal", kill(process, SIGKILL) == 0);
    TRY("a namespace", unshare(CLONE_NEWNS) == 0 || unshare(CLONE_NEWUSER) == 0);
    TRY("unmounting", umount2(folder, MNT_DETACH) == 0);
    TRY("another kind", mounts(folder, "tmpfs"));
    /* Wherever it says: it is mounted where it is to be. */
    TRY("mounting", mounts("/etc", "fuse.evil"));
    TRY("mounting twice", mounts(folder, "fuse.evil"));
    fflush(stdout);
    raise(SIGSEGV);
}
"""


#: What the process that starts a program does.
_RUN = (
    "import json, sys; from tapfs.fuse.files.confined_program import ProgramCall, run;"
    "sys.stderr.write(str(run(ProgramCall(**json.load(sys.stdin)))))"
)


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "evil.c").write_text(_EVIL)
    subprocess.run(["cc", "-w", "-o", folder / "evil", folder / "evil.c"], check=True)
    return folder / "evil"


@pytest.mark.parametrize("writable", [False, True])
def test_an_evil_program_gets_nowhere(evil: Path, tmp_path: Path, writable: bool) -> None:  # noqa: FBT001
    folder, node, elsewhere = tmp_path / "mount", tmp_path / "node", tmp_path / "elsewhere"
    folder.mkdir()
    node.touch()
    elsewhere.write_text("mine")
    with subprocess.Popen(["sleep", "1000"]) as prey:
        call = ProgramCall(
            [str(evil), str(node), str(folder), str(elsewhere), str(prey.pid)],
            str(node),
            str(folder),
            writable=writable,
            flags=[],
            allow_other=False,
        )
        done = subprocess.run(
            [sys.executable, "-c", _RUN],
            input=json.dumps(asdict(call)).encode(),
            capture_output=True,
            check=False,
            cwd=REPOSITORY,
            timeout=60,
        )
        lives = prey.poll() is None
        prey.kill()
    mounted = [mount for mount in mounted_file_systems() if mount.mount_point.startswith(str(tmp_path))]
    for mount in mounted:
        unmount(mount.mount_point, lazy=True)
    assert done.stderr == b"-11"
    assert done.stdout.decode().splitlines() == ["read", *(["write"] if writable else []), "mounting"]
    assert lives
    assert [(each.mount_point, each.type, each.source) for each in mounted] == [(str(folder), "fuse.evil", str(node))]
    assert "allow_other" not in mounted[0].options
    assert os.listdir(folder) == []


def test_who_asks_for_the_type_of_a_file_system_is_in_a_sandbox(tmp_path: Path) -> None:
    """The library parses what a stranger has written, so it may read that and nothing else."""
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    disk.write_bytes(bytes(4096))
    elsewhere.write_text("mine")
    program = (
        "import os, socket, sys; from tapfs.disk import blkid; from tapfs.fuse.files import mount_process\n"
        "from tapfs.fuse.mount_table import MountedFileSystem; from tapfs.fuse.settings import MountSettings\n"
        "def tried(what):\n"
        "    try:\n"
        "        what()\n"
        "    except OSError as error:\n"
        "        return error.strerror\n"
        "    return 'done'\n"
        "def evil(descriptor):\n"
        "    attempts = [lambda: open(sys.argv[1]), socket.socket, os.fork, lambda: open(sys.argv[2] + '/disk', 'r+b'),"
        " lambda: os.pread(descriptor, 1, 0)]\n"
        "    print([tried(attempt) for attempt in attempts])\n"
        "    return []\n"
        "blkid.identify_file = evil; settings = MountSettings(confined=sys.argv[3] == 'True')\n"
        "words = mount_process.FilesWords('image', '/mnt', settings, False); place = os.stat(sys.argv[2]).st_dev\n"
        "device = f'{os.major(place)}:{os.minor(place)}'  # the folder stands for the mount of a disk\n"
        "mount_process.top_mount = lambda path: MountedFileSystem(device, path, '', '', '')\n"
        "mount_process.perform(mount_process.TypeRequest('disk'), words, sys.argv[2])"
    )
    refused = [errno.EACCES, errno.EPERM, errno.EPERM, errno.EACCES]
    for confined in (True, False):
        ran = subprocess.run(
            [sys.executable, "-c", program, elsewhere, tmp_path, str(confined)],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
        )
        expected = [*(os.strerror(number) for number in refused), "done"] if confined else ["done"] * 5
        assert ran.stdout.startswith(str(expected))  # a forked process says it, too
