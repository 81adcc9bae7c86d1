"""Reward files, FILE.py:FUNCTION, in processes of their own: RewardFile is training's end of one, `serve` the other.
The two exchange lines of JSON. Run as a script this file imports the standard library only."""
import asyncio
import importlib.util
import inspect
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import traceback
from numbers import Real


class RewardFile:
    """reward(prompts, completions, **columns) -> list of numbers and None, one per completion; None where the function
    returned something else. What an `async def` returns is awaited. ChildProcessError where it raised, crashed or hung,
    which costs this call: after a crash or a hang the next one gets a new process. timeout: seconds to load, and per
    call; memory: GB. 0: no limit."""

    def __init__(self, name, timeout, memory):
        self.path, _, self.function = name.rpartition(":")
        self.timeout, self.memory, self.child = timeout, memory, None
        self.start()

    def __call__(self, /, **columns):
        if not self.child:
            self.start()
        return self.ask(columns)

    def start(self):
        self.wire, theirs = socket.socketpair()
        self.wire.settimeout(self.timeout or None)
        command = [sys.executable, "-u", __file__, str(int(self.memory * 2**30))]
        with theirs:  # a session of its own: Ctrl-C is training's to handle, and its end takes the whole group
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs, start_new_session=True)
        self.ask([self.path, self.function])

    def ask(self, question):
        """One line there, one line back. Without an answer in time nothing of the process group survives."""
        try:
            self.wire.sendall(json.dumps(question, default=str).encode() + b"\n")  # dates and bytes become text
            answer = json.loads(self.wire.makefile("rb").readline())
        except (OSError, ValueError) as e:
            code = self.stop()
            how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            late = f"no answer after {self.timeout:g} s (--reward_timeout)"
            raise ChildProcessError(late if isinstance(e, TimeoutError) else f"its process ended: {how}") from e
        if isinstance(answer, str):
            if isinstance(question, list) or answer.startswith("MemoryError"):
                self.stop()  # nothing is loaded, or what filled the memory may still be there
            raise ChildProcessError(answer)
        return answer

    def stop(self):
        os.killpg(self.child.pid, signal.SIGKILL)
        self.wire.close()
        with self.child as child:  # closes its stdin and waits
            self.child = None
        return child.returncode


def serve(memory):
    """Answer each line on stdout, which is a socket: first what to load, then calls."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda *_: None)  # schedulers signal every process; training decides when to end
    if os.fork() == 0:  # stdin closes when training ends, however it ends; then the whole process group goes
        os.close(1)
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)
    wire, own, reward = socket.socket(fileno=os.dup(1)).makefile("rw"), os.getpid(), None
    os.dup2(2, 1)  # what the function prints is no answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if memory and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in wire:
        try:
            question, answer = json.loads(line), None
            if reward:
                count, values = len(question["completions"]), reward(**question)
                values = asyncio.run(values) if inspect.iscoroutine(values) else values
                fits = isinstance(values, list) and len(values) == count
                if fits and all(isinstance(v, Real | None) for v in values):
                    answer = [None if v is None else float(v) for v in values]
            else:
                reward = load(*question)
        except BaseException as e:  # user code may raise anything
            answer = traceback.format_exception_only(e)[-1]
        if os.getpid() != own:
            os._exit(0)  # the function forked, and both came back
        wire.write(json.dumps(answer) + "\n")
        wire.flush()


def load(path, function):
    sys.path[0] = os.path.dirname(os.path.abspath(path))  # as for a script: its neighbours can be imported
    spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward = getattr(module, function)
    assert callable(reward), f"{function} is not a function"
    return reward


if __name__ == "__main__":
    serve(int(sys.argv[1]))
