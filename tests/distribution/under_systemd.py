"""Scripts that try the units of the Debian package under a running systemd (`tests.distribution.booted_root`)."""

#: Writes and reads the disk that it is told again and again until somebody makes the file `stop`: whatever is killed
#: meanwhile is a pause. What each block must hold is written beside it.
_USER = r"""
import os, sys
path, stop = sys.argv[1:]
disk, blocks, number = os.open(path, os.O_RDWR), 256, 0
while not os.path.exists(stop) or number < blocks:
    at = 1 << 20 | number % blocks << 12
    assert os.pwrite(disk, number.to_bytes(4096, "big"), at) == 4096
    os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_DONTNEED)
    back = os.pread(disk, 4096, at)
    assert int.from_bytes(back, "big") == number, (number, back[-8:])
    number += 1
    if number == 1:
        print("began", flush=True)
last = [number - 1 - (number - 1 - at) % blocks for at in range(blocks)]
open("expected", "wb").write(b"".join(each.to_bytes(4096, "big") for each in last))
"""

#: A mount of each kind lives through kills of its processes, one by one and together, is restarted and stopped.
MOUNTS = (
    r"""
cd /srv
mkdir tree /mnt/disk /mnt/files
echo hello > tree/file
truncate -s 16M fs.raw
mke2fs -q -t ext4 -d tree fs.raw
tapfs convert -f raw -O qcow2 fs.raw disk.qcow2
tapfs convert -f raw -O vmdk fs.raw files.vmdk
printf 'IMAGE=/srv/disk.qcow2\nDIRECTORY=/mnt/disk\nOPTIONS=--rw\n' > /etc/tapfs/disk.mount
printf 'IMAGE=/srv/files.vmdk\nDIRECTORY=/mnt/files\nOPTIONS=--files --rw\n' > /etc/tapfs/files.mount
cat > user.py << 'end of the program'"""
    + _USER
    + r"""end of the program
until_true() {
    for try in $(seq 600); do
        if (set +x; eval "$1"); then return; fi
        sleep 0.1
    done
    systemctl status --no-pager 'tapfs-mount@*'
    exit 1
}
main_pid() { systemctl show --property MainPID --value tapfs-mount@$1; }
serving() {
    tapfs list --json | python3 -c '
import json, sys
print(*(each["pid"] for each in json.load(sys.stdin)["mounts"] if each["mountpoint"] == "/mnt/'$1'" and each["alive"]))'
}
killed() { # UNIT PROCESS...: they are killed, and others come in their place
    unit=$1 old=$(serving $1)
    shift
    "$@"
    until_true "new=\$(serving $unit); test -n \"\$new\" && test \"\$new\" != $old"
    until_true "systemctl is-active -q tapfs-mount@$unit"
}

systemctl enable --now tapfs-mount@disk
cmp /mnt/disk/disk fs.raw
python3 user.py /mnt/disk/disk /srv/stop > user.log & user=$!
until_true 'test -s user.log'
killed disk kill -KILL $(serving disk)
killed disk kill -KILL $(main_pid disk)
killed disk systemctl kill --signal=KILL tapfs-mount@disk
touch stop
wait $user
dd if=/mnt/disk/disk of=got bs=1M skip=1 count=1 status=none
cmp got expected
systemctl restart tapfs-mount@disk
dd if=/mnt/disk/disk of=got bs=1M skip=1 count=1 status=none
cmp got expected
systemctl stop tapfs-mount@disk
! mountpoint -q /mnt/disk
tapfs check disk.qcow2
tapfs convert -O raw disk.qcow2 back.raw
dd if=back.raw of=got bs=1M skip=1 count=1 status=none
cmp got expected

systemctl start tapfs-mount@files
grep hello /mnt/files/file
echo more > /mnt/files/more
killed files kill -KILL $(serving files)
killed files kill -KILL $(main_pid files)
killed files systemctl kill --signal=KILL tapfs-mount@files
grep more /mnt/files/more
systemctl stop tapfs-mount@files
! mountpoint -q /mnt/files
tapfs check files.vmdk
"""
)

#: What units say of themselves.
UNITS = r"""
systemd-analyze verify --man=no tapfs-mount@disk.service tapfs-volumes.socket tapfs-volumes.service \
    tapfs-blktapctrl.service
systemd-analyze security --no-pager tapfs-blktapctrl.service | tail -n 1
journalctl --no-pager TAPFS_DISK=/mnt/disk TAPFS_IMAGE=/srv/disk.qcow2 -p warning | grep 'was ended by SIGKILL'
"""

#: Volumes by the socket's unit, whose service may be restarted while one is mounted.
VOLUMES = r"""
systemctl enable --now tapfs-volumes.socket
storagectl providers --no-pager | grep -w tapfs
mkdir /mnt/volume
tapfs convert -f raw -O vhdx fs.raw /var/lib/tapfs/volumes/disk.vhdx
storagectl volumes --json=short | grep '"disk.vhdx"'
mount -t storage.ext4 tapfs:disk.vhdx /mnt/volume
grep hello /mnt/volume/file
systemctl restart tapfs-volumes.service
echo more > /mnt/volume/more
umount /mnt/volume
until_true 'tapfs check /var/lib/tapfs/volumes/disk.vhdx'
mount -t storage.ext4 tapfs:disk.vhdx /mnt/volume
grep more /mnt/volume/more
umount /mnt/volume
"""

#: A disk of a simulated machine.
GUESTS_DISK = r"""
cd /srv
export {environment}
{python} -m tapfs.cli blktapctrl --install
systemctl daemon-reload
{python} -m tests.distribution.guests_disk
"""

#: The machine is shut down while a mount has what nobody has synced.
LEFT = r"""
systemctl start tapfs-mount@disk
printf 'written before the end' | dd of=/mnt/disk/disk bs=1 seek=5000000 conv=notrunc status=none
"""

#: In the root afterwards.
AFTERWARDS = r"""
set -eu
cd /srv
tapfs check disk.qcow2
tapfs convert -O raw disk.qcow2 back.raw
test "$(dd if=back.raw bs=1 skip=5000000 count=22 status=none)" = 'written before the end'
"""
