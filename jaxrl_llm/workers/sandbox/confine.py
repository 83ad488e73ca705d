"""What a process takes away from itself before it runs somebody's program.

Landlock leaves it the files that it is told of, to be read; seccomp the system calls of
a program that computes: no other process, no network, no file's owner, time or mode.
What is not allowed fails with an error that the program can catch. No privilege is
needed, and nothing gives any of it back. This module runs inside the jail: standard
library only.

Sources: linux/landlock.h, linux/seccomp.h; numbers of Linux 6.5.
"""

import ctypes
import errno
import math
import os
import platform
import resource
import signal
import struct
from collections.abc import Mapping, Sequence

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# All rights of files that a version of Landlock knows; those of TCP, and what scopes.
_FILES = {1: 2**13 - 1, 2: 2**14 - 1, 3: 2**15 - 1, 4: 2**15 - 1, 5: 2**16 - 1}
_TCP, _SCOPES = 0b11, 0b11
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """The version of Landlock that this system has; 0 for none."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def keep_to(readable: Sequence[str], listed: Sequence[str]) -> None:
    """Leaves this process the files at or below `readable`, to be read, and the names
    in the folders `listed` with all below. Nothing can be written, and no TCP port be
    bound or connected to where this version of Landlock knows that.

    Raises:
      OSError: the system has no Landlock.
    """
    version = landlock_version()
    if not version:
        raise OSError(errno.ENOSYS, "this system has no Landlock")
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    files = _FILES[min(version, 5)]
    rights = struct.pack("QQQ", files, _TCP, _SCOPES)[:size]
    ruleset = _call(_LANDLOCK_CREATE, rights, ctypes.c_size_t(size), 0)
    for paths, folder, file in (
        (readable, _READ_FILE | _READ_DIR, _READ_FILE),
        (listed, _READ_DIR, 0),
    ):
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:  # it is not there, so it is not read
                continue
            right = folder if os.path.isdir(path) else file
            rule = struct.pack("=Qi", right, fd)
            _call(_LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(fd)
    no_new_privileges()
    _call(_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def no_new_privileges() -> None:
    """Nothing that this process starts gets more rights than it has."""
    if _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")


def end_with(parent: int) -> None:
    """Has this process killed when the one that forked it ends."""
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def drop_capabilities() -> None:
    """Takes from a process of root what root may and others may not."""
    header = struct.pack("Ii", 0x20080522, 0)
    if _libc.capset(header, bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


def bound(limits: Mapping[str, float | int | None]) -> None:
    """Sets this process' limits of processor time, memory, files and threads.

    Args:
      limits: cpu_s (rounded up to seconds), memory_bytes, threads (all tasks of this
        user in this name space; None where others' would count too).
    """
    seconds = math.ceil(limits["cpu_s"])
    values = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (64, 64),
    }
    if limits["threads"]:
        values[resource.RLIMIT_NPROC] = (limits["threads"],) * 2
    for kind, value in values.items():
        resource.setrlimit(kind, value)


# Of each system call its numbers on x86-64 and arm64, None where one has no such.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "perf_event_open": (298, 241), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # network, and what goes round this filter
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # the system
    "bpf": (321, 280), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None),
    "ioperm": (173, None), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263), "lookup_dcookie": (212, 18), "nfsservctl": (180, 42),
    "syslog": (103, 116), "vhangup": (153, 58), "uselib": (134, None),
    "personality": (135, 92), "modify_ldt": (154, None), "ustat": (136, None),
    "_sysctl": (156, None), "sysfs": (139, None), "sync": (162, 81),
    "syncfs": (306, 267),
    # memory that outlives a process or that no limit counts
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "mq_open": (240, 180), "mq_unlink": (241, 181), "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # what of files Landlock does not know
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45),
    "mknod": (133, None), "mknodat": (259, 33),
}  # fmt: skip
_CLONE, _CLONE3, _KILL, _TGKILL = (56, 220), (435, 435), (62, 129), (234, 131)
_PRLIMIT, _PRCTL, _FCNTL, _IOCTL = (302, 261), (157, 167), (72, 25), (16, 29)
_SOCKETPAIR = (53, 199)
_NEWEST = 451
"""What has a higher number was not known when this was written."""
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the numbers above, and the architecture's name in a filter."""

_CLONE_THREAD = 0x10000
_SET_DEATH_SIGNAL = 1
_SET_OWNER = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others
_TYPE, _STREAM = 0xF, 1  # of a socket; each packet of other types names its receiver
_TERMINAL = (0x5412, 0x8901, 0x8902)  # TIOCSTI, FIOSETOWN, SIOCSPGRP

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_AND = 0x54
_ALLOW, _ERROR, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16


def filter_calls() -> None:
    """Denies this process and its threads the system calls of `_DENIED`, processes,
    signals to others, and calls that are newer than this module.

    Raises:
      OSError: the system has no seccomp, or no table here is of its machine.
    """
    program = b"".join(_filter(os.getpid()))
    buffer = ctypes.create_string_buffer(program)
    fprog = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    no_new_privileges()
    if _libc.prctl(_SECCOMP, _FILTER, fprog, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def _filter(pid: int) -> list[bytes]:
    machine = platform.machine()
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no system calls of {machine} are known here")
    column, architecture = _MACHINES[machine]
    denied, missing = _give(_ERROR | errno.EPERM), _give(_ERROR | errno.ENOSYS)

    def first_argument(call: tuple[int, int], *test: bytes) -> list[bytes]:
        """What to do with one call, by its first argument."""
        body = [_load(_ARGUMENTS), *test, _give(_ALLOW)]
        return [_skip_unless(call[column], len(body)), *body]

    def second_argument(call: tuple[int, int], wrong: Sequence[int]) -> list[bytes]:
        tests = [part for x in wrong for part in (_skip_unless(x, 1), denied)]
        body = [_load(_ARGUMENTS + 8), *tests, _give(_ALLOW)]
        return [_skip_unless(call[column], len(body)), *body]

    pair_of_streams = [
        _load(_ARGUMENTS + 8),
        _step(_AND, 0, 0, _TYPE),
        _step(_EQUAL, 1, 0, _STREAM),
        denied,
        _give(_ALLOW),
    ]
    numbers = [pair[column] for pair in _DENIED.values() if pair[column] is not None]
    return [
        _load(_ARCHITECTURE),
        _step(_EQUAL, 1, 0, architecture),
        _give(_KILL_PROCESS),
        _load(_NUMBER),
        _step(_GREATER, 0, 1, _NEWEST),
        missing,
        *(part for n in numbers for part in (_skip_unless(n, 1), denied)),
        _skip_unless(_CLONE3[column], 1),
        missing,  # its flags cannot be seen from here; callers fall back on clone
        *first_argument(_CLONE, _step(_ANY_BIT, 1, 0, _CLONE_THREAD), denied),
        *first_argument(_KILL, _step(_EQUAL, 1, 0, pid), denied),
        *first_argument(_TGKILL, _step(_EQUAL, 1, 0, pid), denied),
        *first_argument(_PRLIMIT, _step(_EQUAL, 1, 0, 0), denied),
        *first_argument(_PRCTL, _skip_unless(_SET_DEATH_SIGNAL, 1), denied),
        *second_argument(_FCNTL, _SET_OWNER),
        *second_argument(_IOCTL, _TERMINAL),
        _skip_unless(_SOCKETPAIR[column], len(pair_of_streams)),
        *pair_of_streams,
        _give(_ALLOW),
    ]


def _step(code: int, yes: int, no: int, value: int) -> bytes:
    return struct.pack("HBBI", code, yes, no, value & 0xFFFFFFFF)


def _load(offset: int) -> bytes:
    return _step(_LOAD, 0, 0, offset)


def _skip_unless(value: int, count: int) -> bytes:
    return _step(_EQUAL, 0, count, value)


def _give(verdict: int) -> bytes:
    return _step(_RETURN, 0, 0, verdict)


def _call(number: int, *arguments: int | bytes | ctypes.c_size_t) -> int:
    result = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
