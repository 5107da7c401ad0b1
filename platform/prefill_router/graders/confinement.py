"""Confinement of a process on Linux by Landlock and seccomp, without root and without other programs.

Landlock denies the file system except for listed paths. A seccomp filter allows the system calls that a calculation
needs: no sockets, no new processes, no signals to other processes, no mounts. This module builds both as plain bytes,
since the process that applies them must start fast and cannot import this package.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import struct
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PROTECTIONS = ("landlock", "seccomp")

# Landlock, from linux/landlock.h. Version 3 (Linux 6.2, 2023) is the first that restricts truncation.
_LANDLOCK_ABI = 3
_CREATE_RULESET, _VERSION_FLAG = 444, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1 << 1, 1 << 5, 1 << 8, 1 << 14
_HANDLED_FILES = {3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by the first version that knows these rights
_HANDLED_NET, _SCOPED = {4: 0b11}, {6: 0b11}

_READ = _READ_FILE | _READ_DIR
# Files but no folders: a folder tree could be too deep to remove.
SCRATCH = _READ | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE

# seccomp, from linux/seccomp.h, linux/filter.h and linux/audit.h.
_GET_ACTION_AVAIL, _RET_ERRNO, _RET_ALLOW, _RET_KILL = 2, 0x00050000, 0x7FFF0000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_EPERM, _ENOSYS = 1, 38
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16
_X32 = 0x40000000
_CLONE_THREAD = 0x00010000


class _Machine:
    """System call numbers of one CPU architecture, from the kernel's headers."""

    def __init__(self, audit: int, seccomp: int, allowed: Iterable[int], special: Mapping[str, int]) -> None:
        self.audit, self.seccomp, self.allowed, self.special = audit, seccomp, list(allowed), special


# Allowed: file access, memory, time, threads, waiting. `stat` shows names and sizes outside Landlock's paths. Calls
# that change a file by name (chmod, truncate, link, xattr) are not allowed: Landlock does not cover all of them.
_MACHINES = {
    "x86_64": _Machine(
        0xC000003E,
        317,
        [
            *(0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 23, 24, 25, 28, 32, 33, 34),
            *(36, 37, 38, 39, 40, 44, 45, 48, 51, 55, 60, 63, 73, 74, 75, 77, 79, 80, 81, 82, 85, 87, 95, 96, 97, 98),
            *(99, 100, 102, 104, 107, 108, 110, 111, 115, 121, 124, 131, 158, 186, 201, 202, 204, 217, 218, 219, 221),
            *(228, 229, 230, 231, 232, 233, 257, 262, 263, 264, 269, 270, 271, 273, 274, 281, 290, 291, 292, 293, 309),
            *(2, 35, 316, 318, 324, 332, 334, 436, 439),
        ],
        {"clone": 56, "clone3": 435, "ioctl": 16, "fcntl": 72, "prlimit64": 302, "socketpair": 53},
    ),
    "aarch64": _Machine(
        0xC00000B7,
        277,
        [
            *(17, 19, 20, 21, 22, 23, 24, 32, 35, 38, 46, 48, 49, 50, 56, 57, 59, 61, 62, 63, 64, 65, 66, 67, 68, 71),
            *(72, 73, 79, 80, 82, 83, 93, 94, 96, 98, 99, 100, 101, 102, 103, 113, 114, 115, 123, 124, 128, 132, 134),
            *(135, 139, 153, 155, 156, 158, 160, 163, 165, 166, 168, 169, 172, 173, 174, 175, 176, 177, 178, 179, 204),
            *(206, 207, 209, 210, 214, 215, 216, 222, 223, 226, 233, 276, 278, 283, 291, 293, 436, 439),
        ],
        {"clone": 220, "clone3": 435, "ioctl": 29, "fcntl": 25, "prlimit64": 261, "socketpair": 199},
    ),
}

# Allowed requests of ioctl: TCGETS (is it a terminal?), FIONBIO and FIOCLEX (flags of sockets).
_IOCTLS = (0x5401, 0x5421, 0x5451)
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # not F_SETOWN, which makes the kernel signal another process


@functools.cache
def lacking() -> Mapping[str, str]:
    """The protections that this machine lacks, with the reason of each. Empty if a process can be confined."""
    if sys.platform != "linux":
        return dict.fromkeys(PROTECTIONS, "needs Linux")
    lacks = {}
    if (abi := landlock_abi()) < _LANDLOCK_ABI:
        lacks["landlock"] = f"version {abi}, must be at least {_LANDLOCK_ABI}: Linux 6.2 with landlock enabled"
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        lacks["seccomp"] = f"no system call table for {platform.machine()}"
    elif not _has_seccomp(machine):
        lacks["seccomp"] = "the kernel has no seccomp filters"
    return lacks


def landlock_abi() -> int:
    """The kernel's Landlock version, 0 if it has none or a container hides it."""
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)))


def _has_seccomp(machine: _Machine) -> bool:
    action = ctypes.c_uint32(_RET_ERRNO)
    return bool(_libc().syscall(machine.seccomp, _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def landlock_attributes() -> bytes:
    """`struct landlock_ruleset_attr`: denies everything that this kernel can deny, unless a rule allows it."""
    abi = landlock_abi()
    fields = [
        max((v for k, v in table.items() if k <= abi), default=0) for table in (_HANDLED_FILES, _HANDLED_NET, _SCOPED)
    ]
    return struct.pack("=QQQ", *fields)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]


@functools.cache
def readable_paths(site_packages: bool) -> tuple[tuple[str, int], ...]:
    """Paths that a running interpreter reads, each with its rights: standard library, shared libraries, packages."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or "none"
    libraries = [f"/usr/lib/{multiarch}", f"/lib/{multiarch}", "/lib64", "/usr/lib64", "/etc/ld.so.cache"]
    own = [str(path) for path in Path(sys.base_prefix, "lib").glob("lib*.so*")]
    python = [sysconfig.get_path("stdlib"), sysconfig.get_config_var("DESTSHARED") or ""]
    packages = package_paths() if site_packages else []
    devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/usr/share/zoneinfo"]
    paths = [Path(p) for p in dict.fromkeys([*python, *libraries, *own, *packages, *devices]) if p]
    return tuple((str(p), _READ if p.is_dir() else _READ_FILE) for p in paths if p.exists())


def package_paths() -> list[str]:
    return list(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))


@functools.cache
def seccomp_program() -> bytes:
    """`struct sock_filter`s. A denied call fails with EPERM, so that the code gets an exception, not a signal."""
    machine = _MACHINES[platform.machine()]
    special = machine.special
    program = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_JUMP_EQUAL, 1, 0, machine.audit),
        (_RETURN, 0, 0, _RET_KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _RET_ERRNO | _ENOSYS),
    ]
    for number in machine.allowed:
        program += _when(number, [(_RETURN, 0, 0, _RET_ALLOW)])
    # ENOSYS makes glibc fall back to clone, whose flags a filter can read.
    program += _when(special["clone3"], [(_RETURN, 0, 0, _RET_ERRNO | _ENOSYS)])
    program += _when(special["clone"], [_argument(0), (_JUMP_BITS, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _RET_ALLOW)])
    program += _when(special["ioctl"], _one_of(1, _IOCTLS))
    program += _when(special["fcntl"], _one_of(1, _FCNTLS))
    program += _when(special["prlimit64"], _one_of(0, [0]))  # the process's own limits only
    # asyncio's event loop needs a pair of Unix stream sockets, which reach no other process.
    kind = [_argument(1), (_AND, 0, 0, 0xF), (_JUMP_EQUAL, 0, 1, 1), (_RETURN, 0, 0, _RET_ALLOW)]
    program += _when(special["socketpair"], [_argument(0), (_JUMP_EQUAL, 0, len(kind), 1), *kind])
    program.append((_RETURN, 0, 0, _RET_ERRNO | _EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


_Instruction = tuple[int, int, int, int]


def _when(number: int, body: Sequence[_Instruction]) -> list[_Instruction]:
    """Runs `body` for one system call, and denies the call if `body` does not return."""
    return [(_JUMP_EQUAL, 0, len(body) + 1, number), *body, (_RETURN, 0, 0, _RET_ERRNO | _EPERM)]


def _argument(index: int) -> _Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * index)  # lower half: both architectures are little-endian


def _one_of(argument: int, values: Sequence[int]) -> list[_Instruction]:
    body = [_argument(argument)]
    for value in values:
        body += [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _RET_ALLOW)]
    return body


def environment(folder: str) -> dict[str, str]:
    """The whole environment of a confined process. Fixed hash seeds make grades reproducible."""
    return {"PYTHONHASHSEED": "0", "TMPDIR": folder, "HOME": folder, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
