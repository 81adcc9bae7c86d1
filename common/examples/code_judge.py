"""Judges one completion for code_reward.py: `python -I -S code_judge.py ISOLATION SECONDS PATIENCE`, job on stdin.

  judge      starts the other two, waits for the verdict, ends them and leaves nothing behind
  candidate  runs the code and answers calls of the functions that it defines
  examiner   runs the tests, in which the names of these functions are calls to the candidate

Only plain values travel between the last two (None, numbers, text, bytes, lists, tuples, sets, dicts), as JSON. So the
code can exit, print, patch builtins or search its memory: neither tests nor verdict are in its process, and an object
that equals everything does not travel. Both are enclosed as code_isolation.py says.

The verdict on stdout is one line: passed, failed, idle (it slept while PATIENCE went by), starved (it waited for a
core), or what is wrong with the tests or with this machine. The second line says what memory is bounded by.
"""
import builtins
import functools
import json
import os
import select
import signal
import socket
import sys
import time
import types
from pathlib import Path

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # last: a json.py next to this file is not meant

from code_isolation import MEMORY, SUBREAPER, call, enclose, end_with_parent, memory_group  # noqa: E402

LONGEST = 2**20  # bytes of one answer
CONTAINERS = {kind.__name__: kind for kind in (dict, list, tuple, set, frozenset, bytes)}


# ---- judge -----------------------------------------------------------------------------------------------------------


def judge(isolation, seconds, patience):
    """The job on stdin is read by the examiner alone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    end_with_parent(signal.SIGTERM)  # by a signal that lets this process clean up
    call("prctl", SUBREAPER, 1)  # who loses its parent becomes a child of this process
    group = memory_group(MEMORY)
    enclosure = (isolation, seconds, group)
    try:
        ours, theirs = socket.socketpair()
        read, verdict = os.pipe()
        job = os.dup(0)
        start(candidate, enclosure, verdict, [theirs.fileno()])
        start(examiner, enclosure, verdict, [ours.fileno(), job, verdict])
        for descriptor in ours.detach(), theirs.detach(), verdict:
            os.close(descriptor)
        answer = wait_for_verdict(read, seconds, patience)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_children()
        if group:
            os.rmdir(group)
    print(answer, "a memory cgroup" if group else "the memory of each process", sep="\n", end="")


def start(work, enclosure, verdict, keep):
    if os.fork():
        return
    try:
        try:
            end_with_parent()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            enclose(*enclosure)
        except (OSError, ValueError) as e:  # the latter of a limit that may not be raised
            os.write(verdict, f"{e}\n".encode())
            os._exit(1)
        for descriptor in range(3, 32):
            if descriptor not in keep:
                os.closerange(descriptor, descriptor + 1)
        sys.set_int_max_str_digits(0)  # a right answer may be a long one
        work(*keep)
    finally:
        os._exit(0)


def wait_for_verdict(read, seconds, patience):
    end = time.monotonic() + patience
    used = 0.0
    waited = 0.0
    while time.monotonic() < end:
        ready, _, _ = select.select([read], [], [], 0.2)
        if ready:
            answer = os.read(read, 200).decode(errors="replace")
            return answer.partition("\n")[0] or "failed"  # nothing: the examiner has ended without a verdict
        used, waited = cpu_times()
        if used > seconds:
            return "failed"
    return "idle" if used + waited < patience / 2 else "starved"


def cpu_times():
    """-> seconds of CPU that this process and all below it have used, seconds that those alive waited for a core."""
    used = 0.0
    waited = 0.0
    pids = [os.getpid()]
    for pid in pids:  # which grows
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += (task / "children").read_text().split()
                waited += int((task / "schedstat").read_text().split()[1]) / 1e9
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # user and system, own and of dead children
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return used, waited


def end_children():
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := children.read_text().split():
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


# ---- candidate and examiner ------------------------------------------------------------------------------------------


def candidate(descriptor):
    wire = socket.socket(fileno=descriptor).makefile("rw")
    space = {"__name__": "candidate"}
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
    wire = socket.socket(fileno=descriptor).makefile("rw")
    code, tests = json.load(os.fdopen(job))
    calls = 0

    def ask(question):
        wire.write(json.dumps(question) + "\n")
        wire.flush()
        return json.loads(wire.readline(LONGEST))

    def remote(name, *args, **kwargs):
        nonlocal calls
        calls += 1
        kind, answer = ask([name, encode(args), encode(kwargs)])
        if kind == "value":
            return decode(answer)
        error = getattr(builtins, answer, None)
        if not isinstance(error, type) or not issubclass(error, Exception):
            error = RuntimeError
        if issubclass(error, (StopIteration, StopAsyncIteration)):
            error = RuntimeError  # as PEP 479 has it: these would end a loop of the tests without a word
        raise error

    names = {name for name in ask(code) if name.isidentifier() and not name.startswith("__")} - {*dir(builtins)}
    try:
        tests = compile(tests, "tests", "exec")
    except (SyntaxError, ValueError) as e:
        os.write(verdict, f"tests: {e}\n".encode()[:200])  # the row's fault: no reward
        return
    sys.modules["__main__"] = main = types.ModuleType("__main__")  # where unittest.main() looks for its cases
    sys.argv = ["tests"]
    for name in names:
        setattr(main, name, functools.partial(remote, name))
    try:
        exec(tests, vars(main))
    except SystemExit as e:  # how unittest.main() ends
        if e.code:
            raise
    os.write(verdict, b"passed" if calls else b"tests: call nothing of the code")


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
    judge(isolation=sys.argv[1], seconds=int(sys.argv[2]), patience=float(sys.argv[3]))
