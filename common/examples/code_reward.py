"""A reward that runs code the model wrote: 1 where the last ```python block of a completion passes the row's `tests`.

    python methods/grpo.py --model DIR --dataset FILE --reward_timeout 300 \\
        --reward common/examples/code_reward.py:passes

`tests` is a string of Python or a list of assert statements. A row without tests, or a machine without isolation, gives
None: no reward, which is not a reward of 0.

How a completion is judged, in processes of its own that are gone when the verdict is there:
  candidate  runs the code and answers calls of the functions that it defines
  examiner   runs the tests, in which the names of these functions are calls to the candidate
Only plain values travel between them (None, numbers, text, bytes, lists, tuples, sets, dicts), as JSON. So the code can
exit, print, patch builtins or search its memory: neither tests nor verdict are in its process, and an object that
equals everything does not travel. A function named like a builtin is not callable by the tests.

What both are enclosed in (level "namespaces"; Linux 5.12): pid, mount, network and IPC namespaces, a user namespace
(where training is root: an unused user id), no capabilities, an empty file system of 16 MB with Python's library
read-only, no /proc, no environment, limits on memory, processes, files and time. The pid namespace ends with its first
process, and takes along what called setsid. Where the kernel refuses any of it, passes() says so and gives None.
CODE_REWARD_ALLOW_WEAK=1 then runs with limits only (another user id where training is root, and no further processes):
the network, the disk, readable files and, without root, all that the user owns, its processes included, are open.

Not a security boundary: the kernel is shared, and a bug of it is a way out. Put training that executes code into a
container or virtual machine of its own. Not covered either: memory of all processes together (16 of 512 MB at most, and
as many files in memory; use a cgroup), timing as a side channel, tests so weak that wrong code passes them, and tests
that need more than plain values (arguments changed in place, objects, generators).
"""
import builtins
import ctypes
import functools
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECONDS = 5  # of wall clock for one completion, and of CPU for each process
LONGEST = 2**20  # bytes of one answer
MEMORY = 512 * 2**20
LIMITS = {"AS": MEMORY, "CPU": SECONDS, "FSIZE": 2**24, "NOFILE": 32, "NPROC": 16, "CORE": 0}
ALLOW_WEAK = os.environ.get("CODE_REWARD_ALLOW_WEAK") == "1"
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, BIND, REC, PRIVATE = 2, 4, 4096, 16384, 1 << 18  # flags of mount(2)
PDEATHSIG, SUBREAPER, NO_NEW_PRIVS = 1, 36, 38  # options of prctl(2)
CONTAINERS = {kind.__name__: kind for kind in (dict, list, tuple, set, frozenset, bytes)}


# ---- the reward ------------------------------------------------------------------------------------------------------


def passes(prompts, completions, tests=None, **_):
    """1 where the code passes, 0 where it does not or there is none, None where there are no tests."""
    if not level():
        return [None] * len(completions)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(score, completions, tests or [None] * len(completions)))


def score(completion, tests):
    text = completion[-1]["content"] if isinstance(completion, list) else completion
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    if not tests or not blocks:
        return 0.0 if tests else None
    return {"passed": 1.0, "failed": 0.0}.get(judged(level(), blocks[-1], tests))


def judged(isolation, code, tests):
    """-> passed, failed, or what is wrong with this machine."""
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), isolation]
    job = json.dumps([code, tests if isinstance(tests, str) else "\n".join(tests)])
    with tempfile.TemporaryDirectory(prefix="code_reward") as folder:
        pipes = {"input": job, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            done = subprocess.run(command, **pipes, cwd=folder, env={}, timeout=4 * SECONDS)
        except subprocess.TimeoutExpired:
            return "failed"
    return done.stdout or f"exit code {done.returncode}"


@functools.cache
def level():
    """What stands between the code and this machine, found out by trying, said once. None: too little."""
    for name in ["namespaces", "limits only"][: 1 + ALLOW_WEAK]:
        answer = judged(name, "def one(): return 1", "assert one() == 1")
        if answer == "passed":
            print(f"code_reward: isolation by {name}", flush=True)
            return name
    print(f"code_reward: no rewards, for code cannot be isolated here ({answer}). Allow user namespaces, or in a "
          "container that holds nothing else set CODE_REWARD_ALLOW_WEAK=1", flush=True)  # fmt: skip


# ---- the processes of one completion ---------------------------------------------------------------------------------


def judge(isolation):
    """Start both, wait for the verdict, leave nobody behind. The job on stdin is read by the examiner alone."""
    call("prctl", PDEATHSIG, signal.SIGKILL)
    call("prctl", SUBREAPER, 1)  # who loses its parent becomes a child of this process
    (ours, theirs), (read, verdict), job = socket.socketpair(), os.pipe(), os.dup(0)
    start(candidate, isolation, verdict, theirs.fileno())
    start(examiner, isolation, verdict, ours.fileno(), job, verdict)
    for descriptor in ours.detach(), theirs.detach(), verdict:
        os.close(descriptor)
    ready, _, _ = select.select([read], [], [], SECONDS)
    answer = os.read(read, 200).decode() if ready else ""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := children.read_text().split():
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    print(answer or "failed", end="")


def start(work, isolation, verdict, *keep):
    if os.fork():
        return
    try:
        try:
            call("prctl", PDEATHSIG, signal.SIGKILL)
            enclose(isolation)
        except OSError as e:
            os.write(verdict, str(e).encode())
            os._exit(1)
        for descriptor in range(3, 32):
            if descriptor not in keep:
                os.closerange(descriptor, descriptor + 1)
        work(*keep)
    finally:
        os._exit(0)


def enclose(isolation):
    """Give up everything that this process could do harm with; what comes back is another process."""
    user, group, root = os.geteuid(), os.getegid(), os.getcwd()
    null = os.open(os.devnull, os.O_RDWR)
    os.umask(0o022)
    if isolation == "namespaces":
        call("unshare", NEWNS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user else 0))
        if user:
            maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
            for name, line in maps.items():
                Path("/proc/self", name).write_text(line)
        call("mount", b"none", b"/", None, REC | PRIVATE, None)  # nothing of what follows is seen outside
        call("mount", b"none", root.encode(), b"tmpfs", NOSUID | NODEV, b"size=16m,nr_inodes=1000,mode=755")
        for path in filter(os.path.isdir, ("/usr", "/lib", "/lib64", sys.base_prefix)):
            os.makedirs(root + path, exist_ok=True)
            call("mount", path.encode(), (root + path).encode(), None, BIND | REC, None)
            attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)  # read-only, no set-uid programs, no devices
            call("syscall", 442, -100, (root + path).encode(), 0x8000, attributes, 32)  # mount_setattr, recursive
        os.mkdir(f"{root}/tmp")
        os.chroot(root)  # in which no new user namespace can be made
        os.chdir("/tmp")
        if pid := os.fork():  # the first process of the pid namespace, with which all others end
            os.closerange(0, 32)  # or neither end of a socket would see the other one close
            os.waitpid(pid, 0)
            os._exit(0)
    else:
        LIMITS["NPROC"] = 0  # without a namespace that ends them there are no further processes, nor threads
    os.chmod(".", 0o777)
    os.setsid()  # kill(0) reaches the whole group, whatever the namespace
    for descriptor in 0, 1, 2:
        os.dup2(null, descriptor)
    for name, limit in LIMITS.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if not user:  # a user id that nobody has: its processes are counted, and own nothing
        nobody = 10**9 + os.getppid() + os.getpid()
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # none of any kind
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PDEATHSIG, signal.SIGKILL)  # a change of user has cleared it


def call(name, *args):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def candidate(descriptor):
    wire, space = socket.socket(fileno=descriptor).makefile("rw"), {"__name__": "candidate"}
    exec(json.loads(wire.readline()), space)
    answer = [name for name, value in space.items() if callable(value)]
    while True:
        wire.write(json.dumps(answer) + "\n")
        wire.flush()
        name, args, kwargs = json.loads(wire.readline())
        try:
            answer = ["value", encode(space[name](*decode(args), **decode(kwargs)))]
        except BaseException as e:
            answer = ["error", type(e).__name__]


def examiner(descriptor, job, verdict):
    """What arrives on the wire is whatever the model's code wants to send."""
    wire, (code, tests) = socket.socket(fileno=descriptor).makefile("rw"), json.load(os.fdopen(job))

    def ask(question):
        wire.write(json.dumps(question) + "\n")
        wire.flush()
        return json.loads(wire.readline(LONGEST))

    def remote(name, *args, **kwargs):
        kind, answer = ask([name, encode(args), encode(kwargs)])
        if kind == "value":
            return decode(answer)
        error = getattr(builtins, answer, None)
        raise error if isinstance(error, type) and issubclass(error, Exception) else RuntimeError

    names = {name for name in ask(code) if name.isidentifier() and not name.startswith("__")} - {*dir(builtins)}
    try:
        tests = compile(tests, "tests", "exec")
    except (SyntaxError, ValueError) as e:
        os.write(verdict, f"tests: {e}".encode()[:200])  # the row's fault: no reward
        return
    exec(tests, {name: functools.partial(remote, name) for name in names})
    os.write(verdict, b"passed")


def encode(value):
    """-> JSON that decode() turns into the same plain value; TypeError for any other."""
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return [name, [encode(item) for item in (value.items() if kind is dict else value)]]
    if value is None or isinstance(value, (int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode(value):
    return CONTAINERS[value[0]]([decode(item) for item in value[1]]) if isinstance(value, list) else value


if __name__ == "__main__":
    judge(sys.argv[1])
