"""An ordinary user mounts through fusermount3."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.unit.remote.cut_line import nbd_served

_NOBODY = 65534

#: The user's own view of /dev/fuse, as desktops have it, and of fuse.conf; the machine's are not touched.
_ENTER = 'mount --bind "$1" /dev/fuse && mount --bind "$2" /etc/fuse.conf && shift 2 && exec "$@"'

_SCRIPT = """
set -e
cd {home}
tapfs() {{ {python} -m tapfs.cli "$@"; }}
tapfs mount --engine {engine} -f raw --rw image.raw dir
test "$(stat -c %U:%a dir/disk)" = "$(id -un):600"
cmp dir/disk image.raw
printf changed | dd of=dir/disk conv=notrunc,fsync status=none
tapfs list
sleep 1000 < dir/disk & user=$!
until readlink /proc/$user/fd/0 | grep -q disk; do :; done
tapfs umount dir 2> busy || echo "busy: $?"
grep -q "used by process $user (sleep)" busy
kill $user
wait $user || true
tapfs umount dir
cmp -n 7 image.raw <(printf changed)
test -z "$(ls dir)"
tapfs mount --engine {engine} image.raw dir
pkill -9 -f tapfs.fuse.keeper || true
kill -9 $(tapfs list | sed -n 's/.*process //p')
until tapfs list | grep -q dead; do :; done
tapfs umount dir 2>&1 | grep -q 'had died; cleaned up'
tapfs mount --engine {engine} image.raw / 2> refused || echo "refused: $?"
mkdir locked; chmod 0500 locked
tapfs mount --engine {engine} image.raw locked 2> refused || echo "locked: $?"
grep -q 'no write access' refused
test "$(wc -l < refused)" = 1
test -z "$(ls {home}/runtime/tapfs)"
echo all
"""


@pytest.fixture
def home(root: None) -> Iterator[Path]:
    """A folder of the user's own; pytest's is root's."""
    folder = Path(tempfile.mkdtemp(prefix="tapfs-test-", dir="/tmp"))
    try:
        for name in ("dir", "runtime"):
            (folder / name).mkdir()
        (folder / "image.raw").write_bytes(os.urandom(1 << 20))
        for path in (folder, *folder.iterdir()):
            os.chown(path, _NOBODY, _NOBODY)
        os.mknod(folder / "fuse", 0o666 | stat.S_IFCHR, os.makedev(10, 229))
        (folder / "fuse").chmod(0o666)
        (folder / "fuse.conf").write_text("# user_allow_other\n")
        yield folder
    finally:
        shutil.rmtree(folder)


_FILES = """
set -e
cd {home}
tapfs() {{ {python} -m tapfs.cli "$@"; }}
mkdir content; echo hello > content/text
truncate -s 16M files.raw
mkfs.ext4 -q -F -d content files.raw
tapfs mount --files files.raw dir
cat dir/text
tapfs list | grep -c '^    files, '
tapfs umount dir
tapfs mount --files --rw -f raw files.raw dir
echo more > dir/more
tapfs umount dir
e2fsck -fn files.raw > /dev/null 2>&1
tapfs mount --files files.raw dir
cat dir/more
server=$(tapfs list | sed -n 's/.*process //p'); kill -9 $(ps -o ppid= -p "$server") "$server"
until tapfs list | grep -q dead; do :; done
tapfs umount dir 2>&1 | grep -q 'had died; cleaned up'
until ! pgrep fuse2fs > /dev/null; do :; done
tapfs mount --files --temp files.raw dir
fusermount3 -u dir
until ! pgrep -f 'tapfs[.]cli mount' > /dev/null; do :; done
truncate -s 320M xfs.raw; mkfs.xfs -q xfs.raw
tapfs mount --files xfs.raw dir 2> refused || echo "refused: $?"
grep -q 'only root has the kernel mount one' refused
tapfs mount -o allow_other image.raw dir 2> refused || echo "refused: $?"
grep -q 'user_allow_other' refused
mkdir programs; for each in bash sh mkfs.ext4 fusermount3 ls grep; do ln -s "$(command -v $each)" programs/; done
PATH={home}/programs tapfs mount --files files.raw dir 2> refused || echo "refused: $?"
grep -q 'needs fuse2fs; apt install fuse2fs' refused
test -z "$(ls dir)"
test -z "$(ls {home}/runtime/tapfs)"
echo all
"""


@pytest.mark.parametrize("engine", ["auto", "native", "pyfuse3"])
def test_ordinary_user(home: Path, engine: str) -> None:
    done = run_as_user(home, _SCRIPT.format(home=home, python=sys.executable, engine=engine))
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert f"  {home}/dir: {home}/image.raw" in lines
    assert lines[lines.index("busy: 15") :] == ["busy: 15", "refused: 18", "locked: 19", "all"]
    assert done.returncode == 0


_SESSIONS = """
set -e
cd {home}
tapfs() {{ {python} -m tapfs.cli "$@"; }}
without() {{ env -u XDG_RUNTIME_DIR {python} -m tapfs.cli "$@"; }}
elsewhere() {{ TAPFS_RUNTIME_DIR={home}/other {python} -m tapfs.cli "$@"; }}
mkdir two
tapfs mount image.raw dir
without mount -f raw image.raw two
tapfs list --json | grep -c '"alive": true'
without list --json | grep -c '"alive": true' || true
tapfs umount two
without umount dir
without mount -f raw image.raw two
tapfs umount image.raw
elsewhere mount -f raw --rw image.raw dir
printf changed > dir/disk
tapfs umount dir
cmp -n 7 image.raw <(printf changed)
until elsewhere list --json | grep -q '"mounts": \\[\\]'; do :; done
test -z "$(ls dir)$(ls two)"
echo all
"""


def test_mounts_of_other_sessions(home: Path) -> None:
    """Cron and su have no XDG_RUNTIME_DIR, or another: what was mounted by the one is unmounted by the other."""
    done = run_as_user(home, _SESSIONS.format(home=home, python=sys.executable))
    assert done.stderr == f"tapfs: {home}/dir: unmounted; errors, if any, are in the system log\n" * 2
    assert done.stdout.splitlines() == ["2", "1", "all"]
    assert done.returncode == 0


def test_files_by_fuse2fs(home: Path) -> None:
    done = run_as_user(home, _FILES.format(home=home, python=sys.executable))
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["hello", "1", "more", "refused: 12", "refused: 19", "refused: 12", "all"]
    assert done.returncode == 0


_PROGRAM_AS_ROOT = """
set -e
cd {home}
tapfs() {{ {python} -m tapfs.cli "$@"; }}
truncate -s 16M ntfs.raw
mkfs.ntfs -FqQ -L label ntfs.raw 2> /dev/null
tapfs mount --files --rw -f raw ntfs.raw dir 2> refused || echo "refused: $?"
cat refused
if grep -q ^user_allow_other /etc/fuse.conf; then
    stat -c %U:%a dir
    echo hello > dir/text
    tapfs umount dir
    tapfs mount --files ntfs.raw dir
    cat dir/text
    tapfs umount dir
fi
test -z "$(ls dir)"
test -z "$(ls {home}/runtime/tapfs)"
echo all
"""


def test_a_program_that_would_run_as_root_runs_as_the_user(home: Path) -> None:
    """Debian's ntfs-3g is set-user-ID root, which has no effect in its sandbox, and needs none: others mount for it."""
    script = _PROGRAM_AS_ROOT.format(home=home, python=sys.executable).replace("grep -q ^user_allow_other", "true ")
    done = run_as_user(home, script)
    assert (done.stderr, done.stdout.splitlines()) == ("", ["nobody:700", "hello", "all"])


def test_without_its_sandbox_it_is_refused(home: Path) -> None:
    """Root may not look at what a user has mounted by FUSE."""
    script = _PROGRAM_AS_ROOT.format(home=home, python=sys.executable)
    done = run_as_user(home, script.replace("--files", "--no-sandbox --files"))
    refused, said, end = done.stdout.splitlines()
    assert (refused, end) == ("refused: 19", "all"), done
    assert said.startswith("tapfs: error: ntfs.raw: ")
    assert "ntfs-3g runs as root (set-user-ID), and root may not read what an ordinary user mounts" in said
    assert "add user_allow_other to /etc/fuse.conf" in said


def test_a_program_that_runs_as_root_is_let_in_where_that_is_allowed(home: Path) -> None:
    (home / "fuse.conf").write_text("user_allow_other\n")
    script = _PROGRAM_AS_ROOT.format(home=home, python=sys.executable).replace('-z "$(ls {home}', '-n "$(ls {home}')
    done = run_as_user(home, script.replace("--files", "--no-sandbox --files"))
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["nobody:700", "hello", "all"]


_DISC = """
set -e
cd {home}
export HOME=/nonexistent
tapfs() {{ {python} -m tapfs.cli "$@"; }}
mkdir content; echo hello > content/text
genisoimage -quiet -r -o disc.iso content
tapfs mount --files disc.iso dir
cat dir/text
tapfs umount dir
echo all
"""


def test_a_disc_of_a_user_without_a_home(home: Path) -> None:
    """Fuseiso would keep a list of its mounts in the home directory."""
    done = run_as_user(home, _DISC.format(home=home, python=sys.executable))
    assert (done.stdout.splitlines(), done.stderr) == (["hello", "all"], "")


_DYING = """
cd {home}
tapfs() {{ {python} -m tapfs.cli "$@"; }}
truncate -s 16M files.raw
mkfs.ext4 -q -F files.raw
mkdir programs
PATH={home}/programs:$PATH
printf '#!/bin/sh\\necho "starting on $1"\\nkill -SEGV $$\\n' > programs/fuse2fs
chmod +x programs/fuse2fs
tapfs mount --files files.raw dir; echo "refused: $?"
cc -x c -o programs/fuse2fs - <<'END'
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mount.h>
#include <unistd.h>
int main(int count, char **words) {{
    char options[80];
    sprintf(options, "fd=%d,rootmode=40000,user_id=%d,group_id=%d", open("/dev/fuse", O_RDWR), getuid(), getgid());
    if (count < 3 || mount(words[1], words[2], "fuse.fuse2fs", MS_NOSUID | MS_NODEV, options) != 0) {{ return 1; }}
    puts("mounting");
    fflush(stdout);
    return raise(SIGSEGV);
}}
END
tapfs mount --files files.raw dir; echo "refused: $?"
cat > programs/fuse2fs <<END
#!/bin/sh
echo the cause
while [ "\\${{#much}}" -lt 3000 ]; do much="\\$much padding"; done
echo \\$much the end
exit 3
END
tapfs mount --files files.raw dir; echo "refused: $?"
test -z "$(ls dir)" && test -z "$(ls {home}/runtime/tapfs)" && echo all
"""


def test_a_program_that_dies_is_told(home: Path) -> None:
    """Before and after it has mounted; and of much that it says its start is told, too, where most name the cause."""
    done = run_as_user(home, _DYING.format(home=home, python=sys.executable))
    assert done.stdout.splitlines() == ["refused: 10"] * 3 + ["all"], done
    before, after, much = done.stderr.splitlines()
    assert before == "tapfs: error: files.raw: fuse2fs was ended by SIGSEGV: starting on files.raw"
    assert after == "tapfs: error: files.raw: fuse2fs was ended by SIGSEGV: mounting"
    assert much.startswith("tapfs: error: files.raw: fuse2fs did not mount it: the cause padding padding")
    assert " … " in much
    assert much.endswith("padding the end")


def test_what_lies_elsewhere_is_written(home: Path) -> None:
    """By a process outside of the sandbox, in which fusermount3 has no rights."""
    there = home / "image.raw"
    with nbd_served(there) as path:
        path.chmod(0o666)
        script = (
            f"cd {home}; printf written > new; {sys.executable} -m tapfs.cli dd -f raw -O raw bs=512 count=1 if=new"
            f" of='nbd+unix:///disk?socket={path}'"
        )
        done = run_as_user(home, script)
    assert (done.returncode, done.stderr) == (0, "")
    assert there.read_bytes()[:7] == b"written"


def run_as_user(home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script as another user, with processes and mounts of his own."""
    # The interpreter may lie below a home directory that only root can enter: reading is allowed, no more.
    user = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
    user += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    namespace = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation", "private"]
    return subprocess.run(
        [*namespace, "bash", "-c", _ENTER, "enter", home / "fuse", home / "fuse.conf", *user, "bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_RUNTIME_DIR": str(home / "runtime"),
        },
    )
