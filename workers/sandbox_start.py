"""What a sandboxed process does first, with the standard library alone: take the program, shut the ways out, run it.

Its text is passed to `python -c` (workers/sandbox.py), so no file of ours has to be visible there. What the program gets of it
is nothing: the descriptors are closed or useless, `__main__` is empty, the file with the program and its tests is emptied.
"""

from __future__ import annotations


def start(source_fd: int, report: int, marks_fd: int) -> None:
    """Run what the file `source_fd` holds: a dict with program, tests, nonce, max_processes, may_connect, in the
    interpreter's own format (marshal), which needs no import.

    Write `started` to `report` before the program runs, and after it, for each test that passes, the nonce at that test's place
    in the file `marks_fd`: in memory, as the program may close any descriptor. Everything that marks is bound before the program
    runs, which may replace any builtin.
    """
    import builtins
    import marshal
    import mmap
    import os
    import resource
    import sys

    with open(source_fd, "r+b") as file:
        given = marshal.load(file)
        file.truncate(0)  # a process of the sandbox outside of it may still have it open
    if given["max_processes"]:
        resource.setrlimit(resource.RLIMIT_NPROC, (given["max_processes"],) * 2)
    if not given["may_connect"]:
        deny_sockets()
    nonce, run, failures, parse = given["nonce"], exec, BaseException, compile
    marks = mmap.mmap(marks_fd, 0)
    os.close(marks_fd)
    tests = [(i * len(nonce), (i + 1) * len(nonce), test) for i, test in enumerate(given["tests"])]
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as `site` has them, which is not loaded
    main = sys.modules["__main__"].__dict__
    for name in set(main) - {"__name__", "__builtins__", "__doc__"}:
        del main[name]
    os.write(report, b"started\n")
    os.close(report)
    # each is compiled alone: nothing of this file's own __future__ applies, and theirs may stand first
    run(parse(given["program"], "<program>", "exec", dont_inherit=True), main)
    for begin, end, test in tests:
        try:
            run(parse(test, "<test>", "exec", dont_inherit=True), main)
        except failures:
            continue
        marks[begin:end] = nonce


def deny_sockets() -> None:
    """Let this process and all it starts make internet sockets and connected pairs only (seccomp, Linux).

    In a network namespace of its own the former lead nowhere. Unix sockets (of a container engine, a Redis) are files, and vsock
    belongs to the whole machine: no namespace hides either.
    """
    import ctypes
    import os
    import struct

    machine = os.uname().machine
    # number of the architecture, of socket(2) and of socketpair(2); linux/audit.h and unistd.h
    calls = {"x86_64": (0xC000003E, 41, 53), "aarch64": (0xC00000B7, 198, 199)}
    if machine not in calls:
        raise OSError(f"no filter of system calls for {machine}")
    architecture, socket, socketpair = calls[machine]
    load, mask, if_equal, if_at_least, end = 0x20, 0x54, 0x15, 0x35, 0x06
    deny, allow = 13, 14
    steps = [  # operation, operand, next step if it holds, and if not; linux/seccomp.h has the offsets
        (load, 4, 1, 1),  # 0: the architecture
        (if_equal, architecture, 2, deny),
        (load, 0, 3, 3),  # 2: the system call
        (if_at_least, 0x4000_0000, deny, 4),  # x32, where they have other numbers
        (if_equal, 425, deny, 5),  # io_uring_setup: it makes sockets by itself
        (if_equal, socketpair, 10, 6),
        (if_equal, socket, 7, allow),
        (load, 16, 8, 8),  # 7: its first argument, the family
        (if_equal, 2, allow, 9),  # AF_INET
        (if_equal, 10, allow, deny),  # AF_INET6
        (load, 24, 11, 11),  # 10: its second argument, the type
        (mask, 0xF, 12, 12),
        (if_equal, 1, allow, deny),  # SOCK_STREAM: a pair of another type can send to any address
        (end, 0x0005_0001, 14, 14),  # 13: fail with EPERM
        (end, 0x7FFF_0000, 15, 15),  # 14
    ]
    code = b"".join(
        struct.pack("HBBI", operation, then - i - 1, otherwise - i - 1, operand)
        for i, (operation, operand, then, otherwise) in enumerate(steps)
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(buffer)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    no_new_privileges, set_filter, by_filter = 38, 22, 2
    zero = ctypes.c_ulong(0)
    for arguments in (
        (no_new_privileges, ctypes.c_ulong(1), zero, zero, zero),
        (set_filter, ctypes.c_ulong(by_filter), ctypes.byref(program), zero, zero),
    ):
        if prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses the filter of system calls")
