"""What code_judge.py puts around a process that runs code of a stranger, on Linux from 5.12 on.

  namespaces  of its own for processes, files, network, System V IPC and, where training is not root, users; with the
              first process of the pid namespace, which is ours and not the stranger's, all others end
  files       Python's standard library and the shared libraries, read-only, and an empty /tmp of 16 MB; no packages,
              no /proc, no /dev, no environment
  user        no capabilities; where training is root, a user id that nobody else has
  calls       a seccomp filter: no keyrings, shared memory, message queues, tracing, sockets that leave the process
  limits      of memory, CPU, files and processes, and where a cgroup can be had of the memory of all together

Every function raises OSError where the kernel refuses, and then nothing is run.
"""
import ctypes
import errno
import glob
import os
import resource
import signal
import struct
import sys
from pathlib import Path

MEMORY = 512 * 2**20  # bytes for one process, and for all of one completion where there is a memory cgroup
LIMITS = {"AS": MEMORY, "FSIZE": 2**24, "NOFILE": 32, "NPROC": 8, "CORE": 0}
ROOT = "/proc"  # where the new root is mounted: every Linux has this folder, and no library lies in it
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18  # flags of mount(2)
RECURSIVE = 0x8000  # a flag of mount_setattr(2)
PDEATHSIG, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 22, 36, 38  # options of prctl(2)

# Per machine: how seccomp names it, and the numbers of the system calls that the filter looks at.
MACHINES = {
    "x86_64": {"audit": 0xC000003E, "prctl": 157, "sockets": {"socket": 41, "socketpair": 53}, "forbidden": {
        "keyctl": 250, "add_key": 248, "request_key": 249, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240,
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "unshare": 272, "setns": 308,
        "memfd_create": 319, "io_setup": 206, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "syslog": 103}},
    "aarch64": {"audit": 0xC00000B7, "prctl": 167, "sockets": {"socket": 198, "socketpair": 199}, "forbidden": {
        "keyctl": 219, "add_key": 217, "request_key": 218, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180,
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "unshare": 97, "setns": 268,
        "memfd_create": 279, "io_setup": 0, "bpf": 280, "userfaultfd": 282, "perf_event_open": 241, "syslog": 116}},
}  # fmt: skip
# From this number on all machines count alike: what Linux has learnt since 5.1, such as io_uring and pidfd_getfd. The
# answer is that of an older kernel, which every C library copes with, also for calls that are yet to come.
NEWER_CALLS = 424


def call(name, *args):
    """Call a function of the C library; OSError where it fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def end_with_parent(how=signal.SIGKILL):
    call("prctl", PDEATHSIG, how)


def enclose(isolation, seconds, group):
    """Give up everything that this process could do harm with; what comes back is another process. isolation:
    "namespaces", or "limits only" for what works everywhere and is not enough. seconds: of CPU for each process."""
    root = os.geteuid() == 0
    null = os.open(os.devnull, os.O_RDWR)
    limits = LIMITS | {"CPU": seconds}
    os.umask(0o022)
    if group:
        Path(group, "cgroup.procs").write_text("0")  # 0 is who writes
    if isolation == "namespaces":
        enter_namespaces(root)
        change_root()
        fork_and_wait()
    else:
        limits["NPROC"] = 0  # without a namespace that ends them there are no further processes, nor threads
    os.setsid()  # kill(0) reaches the whole group, whatever the namespace
    for descriptor in 0, 1, 2:
        os.dup2(null, descriptor)
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if root:
        nobody = 10**9 + int.from_bytes(os.urandom(4), "little") % 10**9
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # none of any kind
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    end_with_parent()  # again, because a change of user has cleared it
    if isolation == "namespaces":
        fork_and_wait()  # a stranger must not be the process that the others end with: it could refuse to end
    forbid_calls()


def fork_and_wait():
    """Go on as a child. The parent does nothing more than wait, and ends with it."""
    child = os.fork()
    if child:
        os.closerange(0, 32)  # or neither end of a socket would see the other one close
        os.waitpid(child, 0)
        os._exit(0)
    end_with_parent()


def enter_namespaces(root):
    """The pid namespace begins with the next child."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEWNS | NEWIPC | NEWPID | NEWNET | (0 if root else NEWUSER))
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    call("mount", b"none", b"/", None, REC | PRIVATE, None)  # nothing of what follows is seen outside


def change_root():
    """A small file system with the libraries becomes all that there is."""
    mount_memory(ROOT, b"size=1m,nr_inodes=2000,mode=755")
    standard = os.path.dirname(os.__file__)
    compiled = [path for path in sys.path if path.endswith("lib-dynload")]
    for folder in filter(os.path.isdir, ["/lib", "/lib64", "/usr/lib", "/usr/lib64", standard, *compiled]):
        os.makedirs(ROOT + folder, exist_ok=True)
        mount_read_only(folder)
        for packages in glob.glob(f"{ROOT}{folder}/*-packages") + glob.glob(f"{ROOT}{folder}/python3*/*-packages"):
            mount_memory(packages, b"size=4k,nr_inodes=1,mode=555")  # hidden: a package may hold data and answers
    for library in glob.glob(f"{sys.base_prefix}/lib/*.so*"):  # of a Python with libraries of its own, such as conda
        if os.path.isfile(library) and not os.path.exists(ROOT + library):
            os.makedirs(os.path.dirname(ROOT + library), exist_ok=True)
            Path(ROOT + library).touch()
            mount_read_only(library)
    os.mkdir(f"{ROOT}/tmp")
    make_read_only(ROOT, 0)
    mount_memory(f"{ROOT}/tmp", b"size=16m,nr_inodes=1000,mode=777")
    os.chroot(ROOT)  # in which no new user namespace can be made
    os.chdir("/tmp")


def mount_memory(folder, options):
    call("mount", b"none", folder.encode(), b"tmpfs", NOSUID | NODEV | NOEXEC, options)


def mount_read_only(path):
    """Show a folder or a file of this machine under the new root."""
    call("mount", path.encode(), (ROOT + path).encode(), None, BIND | REC, None)
    make_read_only(ROOT + path, RECURSIVE)


def make_read_only(folder, how):
    attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)  # read-only, no set-uid programs, no devices
    call("syscall", 442, -100, folder.encode(), how, attributes, 32)  # mount_setattr(2)


def memory_group(limit):
    """Return the folder of a new cgroup that bounds the memory of all its processes, None where we may not make one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":  # cgroups of version 1
            folder = f"/sys/fs/cgroup/memory{path}"
            bound = "memory.limit_in_bytes"
        elif controllers == "":  # version 2, where a group that has processes cannot have groups: a neighbour of ours
            folder = os.path.dirname(f"/sys/fs/cgroup{path}")
            bound = "memory.max"
        else:
            continue
        group = Path(folder, f"code_reward_{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / bound).exists():  # the kernel makes it where memory can be bounded
            (group / bound).write_text(str(limit))
            return str(group)
        group.rmdir()
    return None


def forbid_calls():
    """A seccomp filter, which nothing can take off again and every child inherits. OSError on a machine whose numbers
    are not known here. What it forbids fails with "not permitted"; prctl may not undo end_with_parent(), and sockets
    may only be unix ones, since some families (AF_VSOCK) are no part of a network namespace."""
    machine = MACHINES.get(os.uname().machine)
    if machine is None:
        raise OSError(f"seccomp: no list of system calls for {os.uname().machine}")
    # Classic BPF. A line is (instruction, lines to skip if true, lines to skip if false, number).
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    number, architecture, first_argument = 0, 4, 16  # offsets in what the kernel shows to the filter
    allow = (end, 0, 0, 0x7FFF0000)
    refuse = (end, 0, 0, 0x50000 | errno.EPERM)
    unknown = (end, 0, 0, 0x50000 | errno.ENOSYS)
    kill = (end, 0, 0, 0x80000000)
    lines = [(load, 0, 0, architecture), (equal, 1, 0, machine["audit"]), kill]  # 32-bit calls have other numbers
    lines += [(load, 0, 0, number), (at_least, 0, 1, NEWER_CALLS), unknown]
    for forbidden in machine["forbidden"].values():
        lines += [(equal, 0, 1, forbidden), refuse]
    lines += [(equal, 0, 4, machine["prctl"])]
    lines += [(load, 0, 0, first_argument), (equal, 0, 1, PDEATHSIG), refuse, allow]
    for socket_call in machine["sockets"].values():
        lines += [(equal, 0, 4, socket_call)]
        lines += [(load, 0, 0, first_argument), (equal, 1, 0, 1), refuse, allow]  # 1 is AF_UNIX
    lines += [allow]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HP", len(lines), ctypes.addressof(code))
    call("prctl", SECCOMP, 2, ctypes.create_string_buffer(program), 0, 0)
