"""Reward files (FILE.py:FUNCTION): a function of anybody's, in a process of its own.

`RewardFile` is training's end and `serve` the other. They exchange lines of JSON: first what the function takes, then
the columns of each call, and its answer.
"""
import asyncio
import copy
import importlib.util
import inspect
import json
import math
import numbers
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback

LONGEST = 2**16  # bytes of a line about a function, or about an error: serve cuts those to 1,000 characters
NUMBER_BYTES = 32  # of an answer's line, for each completion: the longest float takes 24, and a comma and a blank
PATIENCE_WITH_DEATH = 10  # seconds that a killed process may take to end


class RewardFile:
    """The function of FILE.py:FUNCTION in a process of its own. A call returns the function's list of numbers and None,
    or None for any other answer. ChildProcessError where it raised, crashed, hung or said too much: after the last
    three the next call gets a new process. timeout: seconds of a call, memory: GB of address space. 0 of either: no
    limit. takes: the names of the columns that the function takes, None: all."""

    def __init__(self, name, timeout, memory):
        self.command = [sys.executable, "-uPc", CHILD_PROGRAM, name, str(memory)]  # P: without a json.py of this folder
        self.timeout = timeout
        self.child = None
        self.start(self.deadline())

    def __call__(self, /, **columns):
        end = self.deadline()
        if self.child is None:
            self.start(end)
        count = len(columns["completions"])
        if self.takes is not None:
            columns = {name: columns[name] for name in self.takes if name in columns}
        question = {"count": count, "columns": fold(columns)}
        answer = self.ask(question, end, most=LONGEST + NUMBER_BYTES * count)
        if isinstance(answer, str):
            if answer.startswith("MemoryError"):
                self.stop()  # what filled the memory may still be there
            raise ChildProcessError(answer)
        return answer

    def deadline(self):
        return time.monotonic() + self.timeout if self.timeout else math.inf

    def start(self, end):
        """Start the process, which loads the file and says what the function takes."""
        self.wire, other_end = socket.socketpair()
        # A thread's stacks and arenas are address space, too: on 64 cores more than --reward_memory leaves.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        options = {"stdin": subprocess.PIPE, "stdout": other_end, "start_new_session": True}
        options["env"] = one_thread | os.environ  # who sets them means it
        with other_end:  # a session of its own: Ctrl-C is training's to handle, and its end takes the whole group
            self.child = subprocess.Popen(self.command, **options)
        self.takes = self.ask(None, end, most=LONGEST)
        if isinstance(self.takes, str):
            self.stop()
            raise ChildProcessError(self.takes)

    def ask(self, question, end, most):
        """Send a question, if there is one, and return the answer. It is there by `end`, a time.monotonic(), and has
        at most so many bytes, or the process ends."""
        text = b"" if question is None else json.dumps(question, default=str).encode() + b"\n"  # dates become text
        line = bytearray()
        try:
            self.allow(end)
            self.wire.sendall(text)  # all of it by then
            while b"\n" not in line[-LONGEST:]:
                if len(line) > most:
                    raise ValueError(f"its answer has more than {most} bytes")
                self.allow(end)  # a read for itself has no limit: a process could write a byte now and then
                received = self.wire.recv(LONGEST)
                if not received:
                    raise EOFError
                line += received
            return json.loads(line.partition(b"\n")[0])
        except TimeoutError as e:
            self.stop()
            raise ChildProcessError(f"no answer after {self.timeout:g} s (--reward_timeout)") from e
        except (OSError, EOFError) as e:
            code = self.stop()
            reason = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            raise ChildProcessError(f"its process ended: {reason}") from e
        except (ValueError, RecursionError) as e:
            self.stop()
            raise ChildProcessError(f"its process wrote what is no answer: {str(e)[:200]}") from e

    def allow(self, end):
        """Let the next operation on the wire last until `end`."""
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.wire.settimeout(None if left == math.inf else left)

    def stop(self):
        """Kill the process group and return the exit code of its first process. A process that waits for a broken disk
        (state D) hears nothing: it is left behind, and said to be."""
        child = self.child
        self.child = None
        self.wire.close()
        os.killpg(child.pid, signal.SIGKILL)
        child.stdin.close()
        try:
            return child.wait(PATIENCE_WITH_DEATH)
        except subprocess.TimeoutExpired:
            text = f"reward process {child.pid} was killed and does not end: what it waits for is broken"
            print(text, file=sys.stderr, flush=True)
            return -signal.SIGKILL


def fold(columns):
    """Return the columns as they travel, each as [values, copies]: what stands in a list several times in a row, as the
    columns of a group do, is sent once. What is no list is [value, None]."""
    folded = {}
    for name, column in columns.items():
        if not isinstance(column, list):
            folded[name] = [column, None]
            continue
        values, copies = [], []
        for value in column:
            if values and values[-1] is value:
                copies[-1] += 1
            else:
                values.append(value)
                copies.append(1)
        folded[name] = [values, copies]
    return folded


# ---- the other end -------------------------------------------------------------------------------
def serve(name, memory):
    """Load the function and say which columns it takes: a list of names, or null for all. Then answer each line, a call
    of it, with a line: a list, or null where the function returned something else. In place of either a text says what
    went wrong. memory: bytes, 0: no limit."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda *_: None)  # schedulers signal every process; training decides when to end
    if os.fork() == 0:  # stdin closes when training ends, however it ends; then the whole process group goes
        os.close(1)
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)
    wire = socket.socket(fileno=os.dup(1)).makefile("rw")
    os.dup2(2, 1)  # what the function prints goes to stderr
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if memory and sys.platform == "linux":
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        if most == resource.RLIM_INFINITY or memory < most:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    path, _, function_name = name.rpartition(":")
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # as for a script: its neighbours can be imported, too
    os.register_at_fork(after_in_child=wire.close)  # where the function forks and both come back, only one may answer
    function = or_error(load_function, path, function_name)
    answer = function if isinstance(function, str) else or_error(column_names, function)
    print(json.dumps(answer), file=wire, flush=True)
    for line in wire:
        print(json.dumps(or_error(answer_to, line, function)), file=wire, flush=True)


def or_error(work, *given):
    """Return what work(*given) returns or, since user code may raise anything, the beginning of its error's text."""
    try:
        return work(*given)
    except BaseException as e:
        return traceback.format_exception_only(e)[-1][:1000]


def load_function(path, name):
    """Return the function of a file, which is loaded by its path: its name may be one of the standard library's."""
    spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function


def column_names(function):
    """Return the names of what a function takes; None where it takes any name (**columns), or does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_POSITIONAL]


def unfold(folded):
    """The inverse of `fold`: TRL's form, a value for each completion, which may be changed without changing others'.
    Texts cannot be changed, so that their copies take no memory."""
    columns = {}
    for name, (values, copies) in folded.items():
        if copies is None:
            columns[name] = values
            continue
        columns[name] = []
        for value, count in zip(values, copies):
            columns[name] += [copy.deepcopy(value) for _ in range(count)]
    return columns


def answer_to(line, function):
    """Return what the function returns for a call, if that is a list, tuple, array or tensor of numbers and None, one
    for each completion, as a list; else None."""
    call = json.loads(line)
    count = call["count"]
    values = function(**unfold(call["columns"]))
    if inspect.iscoroutine(values):  # of an `async def`
        values = asyncio.run(values)
    if hasattr(values, "tolist"):  # of numpy or torch
        values = values.tolist()
    if not isinstance(values, list | tuple) or len(values) != count:
        return None
    values = [value.item() if hasattr(value, "item") else value for value in values]
    if all(isinstance(value, numbers.Real | None) for value in values):
        return [None if value is None else float(value) for value in values]
    return None


# What the process runs, without an import of this project. Taken now, as this file may change before a later start.
CHILD_IMPORTS = """import asyncio, copy, importlib.util, inspect, json, numbers
import os, resource, signal, socket, sys, traceback
"""
CHILD_MAIN = "serve(sys.argv[1], int(float(sys.argv[2]) * 2**30))"
CHILD_PARTS = [serve, or_error, load_function, column_names, unfold, answer_to]
CHILD_PROGRAM = CHILD_IMPORTS + "\n".join(map(inspect.getsource, CHILD_PARTS)) + CHILD_MAIN
