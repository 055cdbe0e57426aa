"""The system calls that the student may not make: a seccomp filter in the kernel's classic BPF.

A refused call fails with EPERM; calls that a library tries first and can do without fail with ENOSYS.
"""

import ctypes
import errno
import struct

import system

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}

# name: (x86_64, aarch64), -1 where it does not exist. From the kernel's unistd headers.
_REFUSED = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    # the network, and sockets in the file system
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "mount_setattr": (442, 442),
    "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "unshare": (272, 97), "setns": (308, 268), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "open_tree_attr": (467, 467),
    # memory that no limit counts, or that outlives its process
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219),
    # wide doors into the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "modify_ldt": (154, -1), "iopl": (172, -1), "ioperm": (173, -1), "personality": (135, 92),
    # the machine
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89),
    "quotactl": (179, 60), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
}  # fmt: skip
_ABSENT = {
    "clone3": (435, 435), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
}  # fmt: skip
# what Landlock does not guard: owners, modes, times and attributes of files that may be read
_ATTRIBUTES = {
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1),
    "lchown": (94, -1), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, -1), "utimes": (235, -1),
    "utimensat": (280, 88), "futimesat": (261, -1), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
# what it does not, of other processes of the same user
_PRIORITIES = {
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setparam": (142, 118),
}  # fmt: skip
_PRLIMIT = (302, 261)
_IOCTL = (16, 29)
_HARMLESS_IOCTLS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal; bytes waiting; blocking; closed at exec
_FCNTL = (72, 25)
_OWNERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: whom the kernel signals about a file
_FORK = {"fork": (57, -1), "vfork": (58, -1)}
_QUEUE_SIGNAL = {"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)}
_CLONE, _SOCKET_PAIR = (56, 220), (53, 199)
_SIGNAL = {"kill": (62, 129), "tgkill": (234, 131)}
_TKILL = (200, 130)

_NEW_NAMESPACE = 0x7E020080  # every CLONE_NEW* flag
_THREAD = 0x00010000
_NEWER = 470  # calls from here on were not known to this list; those of the x32 form have numbers far above

_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_SECCOMP, _FILTER = 22, 2  # prctl


def install(forks: bool, own: int | None = None) -> None:
    """Refuse the calls, for this process and all that it starts, for good. Raises OSError where the kernel cannot.

    forks: may start processes. own: its process id, where no namespaces part it from others: it may then send signals to
    no other process, and change no attributes of files and processes.
    """
    if system.MACHINE not in _ARCHITECTURE:
        raise OSError(f"seccomp: no numbers of system calls known for {system.MACHINE}")
    program = b"".join(struct.pack("HBBI", *step) for step in _program(forks, own))
    code = ctypes.create_string_buffer(program, len(program))
    length = len(program) // 8
    pointer = struct.pack("H6xQ", length, ctypes.addressof(code))
    system.forbid_new_privileges()
    # Where the kernel knows of it, the filter covers threads, too; there are none yet, so prctl is enough.
    result = system.LIBC.prctl(
        _SECCOMP, ctypes.c_ulong(_FILTER), ctypes.c_char_p(pointer), ctypes.c_ulong(0), ctypes.c_ulong(0)
    )
    system.check(result, "seccomp filter")


def _program(forks: bool, own: int | None) -> list[tuple[int, int, int, int]]:
    """Steps (code, jump if true, jump if false, constant)."""
    column = _COLUMN[system.MACHINE]
    refuse = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    absent = (_RETURN, 0, 0, _ERROR | errno.ENOSYS)
    allow = (_RETURN, 0, 0, _ALLOW)

    def when(numbers: tuple[int, int], *steps: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        return [(_EQUAL, 0, len(steps), numbers[column]), *steps] if numbers[column] >= 0 else []

    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _ARCHITECTURE[system.MACHINE]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _NEWER),
        absent,
    ]
    for numbers in _REFUSED.values():
        program += when(numbers, refuse)
    for numbers in _ABSENT.values():
        program += when(numbers, absent)
    # Stream pairs only: through a datagram pair one can send to any socket in the file system.
    kind = [(_LOAD, 0, 0, _ARGUMENT + 8), (_AND, 0, 0, 0xF), (_EQUAL, 1, 0, 1), refuse, allow]
    program += when(_SOCKET_PAIR, *kind)
    flags = [(_LOAD, 0, 0, _ARGUMENT), (_ANY_BIT, 0, 1, _NEW_NAMESPACE), refuse]
    if not forks:
        flags += [(_ANY_BIT, 1, 0, _THREAD), refuse]
        for numbers in _FORK.values():
            program += when(numbers, refuse)
    program += when(_CLONE, *flags, allow)
    # Limits of its own only: at the limits of the sandbox's first process, the kernel would kill that.
    program += when(_PRLIMIT, (_LOAD, 0, 0, _ARGUMENT), (_EQUAL, 1, 0, 0), refuse, allow)
    if own is not None:
        for numbers in (_ATTRIBUTES | _PRIORITIES).values():
            program += when(numbers, refuse)
        kinds = [step for kind in _HARMLESS_IOCTLS for step in ((_EQUAL, 0, 1, kind), allow)]
        program += when(_IOCTL, (_LOAD, 0, 0, _ARGUMENT + 8), *kinds, refuse)
        kinds = [step for kind in _OWNERS for step in ((_EQUAL, 0, 1, kind), refuse)]
        program += when(_FCNTL, (_LOAD, 0, 0, _ARGUMENT + 8), *kinds, allow)
        for numbers in _SIGNAL.values():
            program += when(numbers, (_LOAD, 0, 0, _ARGUMENT), (_EQUAL, 1, 0, own), refuse, allow)
        program += when(_TKILL, refuse)
        for numbers in _QUEUE_SIGNAL.values():
            program += when(numbers, refuse)
    return [*program, allow]
