"""The numbers of the system calls that the sandbox has an opinion on, for each architecture.

Pairs are those of x86_64 and of aarch64, None where an architecture does not have the call. Calls since Linux 5.1 have
one number everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # Other processes: look into, stop, change.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # The kernel and the machine.
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "reboot": (169, 142),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "vhangup": (153, 58),
    "nfsservctl": (180, 42),
    "lookup_dcookie": (212, 18),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "personality": (135, 92),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    # Mounts and namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    # Other users.
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setfsuid": (122, 151),
    "setfsgid": (123, 152),
    "setgroups": (116, 159),
    # Modes and owners by name, which Landlock does not limit. Open files have calls of their own.
    "chmod": (90, None),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "mknod": (133, None),
    "mknodat": (259, 33),
    # What some doors need.
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "prlimit64": (302, 261),
}

_COLUMNS = {"x86_64": 0, "aarch64": 1}

PROGRAMS = ("execve", "execveat")
FORKS = ("fork", "vfork")
SOCKETS = ("bind", "listen", "accept", "accept4")
IDENTITIES = (
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid"),
    *("setfsuid", "setfsgid", "setgroups"),
)

#: Calls that no door needs.
NEVER = tuple(
    name
    for name in _NUMBERS
    if name not in (*PROGRAMS, *FORKS, *SOCKETS, "clone", "clone3", "socket", "connect", "io_uring_setup")
    if name not in ("ioctl", "prlimit64")
)

#: A number behind all that are known: newer calls are refused as if the kernel did not have them.
LAST_KNOWN = 470


def number_of(name: str, architecture: str) -> int | None:
    """The number of a call; None where the architecture does not have it."""
    return _NUMBERS[name][_COLUMNS[architecture]]


def numbers_of(names: Iterable[str], architecture: str) -> Iterator[int]:
    """The numbers of calls that the architecture has."""
    for name in names:
        number = number_of(name, architecture)
        if number is not None:
            yield number
