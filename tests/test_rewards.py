"""Reward files run in processes of their own. Whatever these do, training lives, says what happened, and nobody is left
behind."""

import importlib.util
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command, ended, read_jsonl, script, tiny_rows, train, trainer_tensors, try_train
from safetensors.torch import load_file

from common import rewards
from common.data import Row
from common.rewards import RewardFile, accuracy, ends_in_number, heldout_metrics, load_rewards, reward_groups
from common.rewards import reward_table, rollout_metrics, write_samples
from common.runtime.flags import InputError
from common.runtime.folders import find_checkpoint
from common.runtime.parallel import partial_parameters
from common.runtime.run import say

HOSTILE = '''
import ctypes, itertools, os, random, resource, signal, subprocess, sys, threading, time
calls = []

def hostile(function):
    def reward(prompts, completions, fine=None, **columns):
        return [0.1, 2] if fine else function(prompts, completions, **columns)
    return reward

@hostile
def raises(prompts, completions): raise KeyError("one\\ntwo")
@hostile
def raises_no_exception(prompts, completions):
    class Stop(BaseException): pass
    raise Stop("here")
@hostile
def interrupts(prompts, completions): raise KeyboardInterrupt
@hostile
def leaves(prompts, completions): sys.exit(0)
@hostile
def recurses(prompts, completions): return deeper(0)
def deeper(n): return deeper(n + 1)
@hostile
def huge(prompts, completions): return [10**400] * 2
@hostile
def bad_message(prompts, completions):
    class Mute(Exception):
        def __str__(self): raise Mute()
    raise Mute()
@hostile
def reads_stdin(prompts, completions): input()
@hostile
def memory(prompts, completions): calls.append(bytearray(9 << 30))
@hostile
def exits(prompts, completions): os._exit(7)
@hostile
def exits_well(prompts, completions): os._exit(0)
@hostile
def segfaults(prompts, completions): ctypes.string_at(0)
@hostile
def aborts(prompts, completions): os.abort()
@hostile
def kills_itself(prompts, completions): os.kill(os.getpid(), signal.SIGKILL)
@hostile
def kills_its_group(prompts, completions): os.killpg(0, signal.SIGKILL)
@hostile
def exits_with_a_child(prompts, completions):
    subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
    os._exit(7)
@hostile
def sleeps(prompts, completions): time.sleep(1000)
@hostile
def spins(prompts, completions):
    while True: pass
@hostile
def holds_the_gil(prompts, completions): ctypes.PyDLL(None).sleep(1000)
@hostile
def ignores_signals(prompts, completions):
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP): signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)
@hostile
def catches_all(prompts, completions):
    while True:
        try: time.sleep(1000)
        except BaseException: pass
@hostile
def hangs_with_threads_and_children(prompts, completions):
    threading.Thread(target=time.sleep, args=[1000]).start()
    subprocess.run(["sleep", "1000"])
@hostile
def stops_itself(prompts, completions): os.kill(os.getpid(), signal.SIGSTOP)
@hostile
def none(prompts, completions): return None
@hostile
def one_number(prompts, completions): return 1.0
@hostile
def texts(prompts, completions): return ["1.0", "2.0"]
@hostile
def nested(prompts, completions): return [[1.0], [2.0]]
@hostile
def short(prompts, completions): return [1.0]
@hostile
def generator(prompts, completions): return (1.0 for _ in completions)
@hostile
def endless(prompts, completions): return itertools.count()
@hostile
def empties_its_inputs(prompts, completions):
    completions.clear()
    return []
@hostile
def not_finite(prompts, completions): return [float("nan"), float("-inf")]
@hostile
def kinds(prompts, completions): return [True, None]
@hostile
def changes_its_inputs(prompts, completions):
    prompts[:], completions[:] = [None], ["x"] * 9
    return [1.0, 2.0]
@hostile
def prints(prompts, completions):
    print("x" * 10_000_000)
    os.write(1, b"[7.0, 7.0]\\n")
    return [1.0, 2.0]
@hostile
def closes_stdout(prompts, completions):
    sys.stdout.close()
    os.closerange(0, 3)
    return [1.0, 2.0]
@hostile
def leaves_threads(prompts, completions):
    for _ in range(8): threading.Thread(target=time.sleep, args=[1000]).start()
    return [1.0, 2.0]
@hostile
def leaves_children(prompts, completions):
    subprocess.Popen(["sleep", "1000"])
    return [1.0, 2.0]
@hostile
def forks(prompts, completions):
    if os.fork() == 0:
        time.sleep(0.1)
        return [8.0, 8.0]
    time.sleep(0.3)
    return [1.0, 2.0]
@hostile
def changes_the_process(prompts, completions):
    os.chdir("/"); os.environ["REWARD"] = "1"; random.seed(0); os.umask(0o777); os.nice(5)
    signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.setitimer(signal.ITIMER_REAL, 1000)
    sys.setrecursionlimit(50); resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)); sys.path.clear()
    return [1.0, 2.0]
def counts(prompts, completions, fail=None, **columns):
    calls.append(0)
    if fail == ["value"]: raise ValueError
    if fail == ["exit"]: os._exit(1)
    return [len(calls)]
def echo(prompts, completions, **columns):
    open(columns["where"][0], "w").write(repr(columns["what"]))
    return [0.1 + 0.2]
def accuracy_again(prompts, completions, answer, **columns):
    import re
    found = [re.findall(r"#### *([0-9]+)", c[-1]["content"]) for c in completions]
    return [float(f[-1:] == [str(a)]) / 3 for f, a in zip(found, answer)]
def one_rank_dies(prompts, completions, **columns):
    if os.environ["RANK_FILE"] and not os.path.exists(os.environ["RANK_FILE"]):
        open(os.environ["RANK_FILE"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(i) for i in range(len(completions))]
def slow(prompts, completions, **columns):
    calls.append(0)
    if len(calls) == 2:
        open(os.path.join(os.path.dirname(__file__), "slow"), "w").close()
        time.sleep(2)
    return [float(i) for i in range(len(completions))]
'''
FAILS = {  # function: what it says, and whether its process is a new one afterwards
    "raises": ("KeyError: 'one", False), "raises_no_exception": ("Stop: here", False),
    "interrupts": ("KeyboardInterrupt", False), "leaves": ("SystemExit: 0", False),
    "recurses": ("RecursionError", False), "huge": ("OverflowError", False), "reads_stdin": ("EOFError", False),
    "bad_message": ("Mute: <exception str() failed>", False), "memory": ("MemoryError", True),
    "exits": ("exit code 7", True), "exits_well": ("exit code 0", True),
    "segfaults": ("Segmentation fault", True), "aborts": ("Aborted", True),
    "kills_itself": ("Killed", True), "kills_its_group": ("Killed", True), "exits_with_a_child": ("exit code 7", True),
}  # fmt: skip
HANGS = ["sleeps", "spins", "holds_the_gil", "ignores_signals", "catches_all", "hangs_with_threads_and_children",
         "stops_itself"]  # fmt: skip
WRONG = ["none", "one_number", "texts", "nested", "short", "generator", "endless", "empties_its_inputs"]
WELL = {"not_finite": [float("nan"), float("-inf")], "kinds": [1.0, None]} | dict.fromkeys(
    ["changes_its_inputs", "prints", "closes_stdout", "leaves_threads", "leaves_children", "forks",
     "changes_the_process"], [1.0, 2.0])  # fmt: skip


def alive(where):
    """Processes that run, not zombies, whose (session, command line) is what `where` says."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, *fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            if state != "Z" and where(int(fields[2]), (folder / "cmdline").read_bytes().decode(errors="replace")):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def nobody(where, seconds=3.0):
    end = time.monotonic() + seconds
    while alive(where) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(where)


@pytest.fixture
def reward(tmp_path):
    """reward(function) -> RewardFile; after the test none of its processes is left."""
    (tmp_path / "hostile.py").write_text(HOSTILE)
    made = []

    def make(function, timeout=30, memory=4):
        made.append(RewardFile(f"{tmp_path}/hostile.py:{function}", timeout, memory))
        return made[-1]

    yield make
    for one in made:
        session = one.child and one.child.pid
        if one.child:
            one.stop()
        assert nobody(lambda sid, _: sid == session)  # noqa: B023  called at once


TWO = {"prompts": ["a", "b"], "completions": ["c", "d"]}


# ---- reward files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FAILS)
def test_functions_that_fail(function, reward):
    text, anew = FAILS[function]
    one = reward(function)
    for _ in range(2):
        session = one.child.pid
        with pytest.raises(ChildProcessError, match=re.escape(text)):
            one(**TWO)
        assert (one.child is None) == anew and (not anew or nobody(lambda sid, _: sid == session))  # noqa: B023
        assert one(**TWO, fine=[1, 1]) == [0.1, 2.0]


@pytest.mark.parametrize("function", HANGS)
def test_functions_that_hang(function, reward):
    one = reward(function)
    one.timeout = 0.5  # starting took what it took
    session, started = one.child.pid, time.monotonic()
    with pytest.raises(ChildProcessError, match="no answer after .* s .--reward_timeout"):
        one(**TWO)
    assert time.monotonic() - started < 3 and nobody(lambda sid, _: sid == session)
    one.timeout = 30  # a new process starts, which takes what it takes
    assert one(**TWO, fine=[1, 1]) == [0.1, 2.0]


@pytest.mark.parametrize("function", WRONG)
def test_what_is_no_list_of_numbers(function, reward):
    one = reward(function)
    assert one(**TWO) is None and one(**TWO, fine=[1, 1]) == [0.1, 2.0]


@pytest.mark.parametrize("function", WELL)
def test_functions_that_misbehave_and_answer(function, reward):
    one = reward(function)
    process = one.child.pid
    for _ in range(2):
        given = {name: list(values) for name, values in TWO.items()}
        assert repr(one(**given)) == repr(WELL[function]) and given == TWO
    assert one(**TWO, fine=[1, 1]) == [0.1, 2.0] and one.child.pid == process


def test_training_is_not_touched(reward):
    def mine():
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
        return (os.getcwd(), dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), handlers, sys.path[:],
                signal.getitimer(signal.ITIMER_REAL), sys.getrecursionlimit(), torch.get_default_dtype())  # fmt: skip

    before = mine()
    reward("changes_the_process")(**TWO)
    assert mine() == before


def test_state_lives_as_long_as_the_process(reward):
    """Through an exception, not through a crash."""
    one, call = reward("counts"), {"prompts": ["a"], "completions": ["b"]}
    assert [one(**call), one(**call)] == [[1.0], [2.0]]
    with pytest.raises(ChildProcessError):
        one(**call, fail=["value"])
    assert one(**call) == [4.0]
    with pytest.raises(ChildProcessError):
        one(**call, fail=["exit"])
    assert one(**call) == [1.0]


def test_columns(reward, tmp_path):
    """JSON's kinds arrive as they are, others as text; no name of a column is in the way; a float returns bitwise."""
    from datetime import datetime

    what = [1, 0.1, "a\u2028\ud800", None, [{"b": [True]}], float("inf"), datetime(2026, 1, 2), b"x"]
    columns = {"where": [str(tmp_path / "seen")], "what": what, "self": [1], "name": [2]}
    assert reward("echo")(prompts=["a"], completions=["b"], **columns) == [0.1 + 0.2]
    assert (tmp_path / "seen").read_text() == repr([*what[:-2], "2026-01-02 00:00:00", "b'x'"])


@pytest.mark.parametrize("text, needle", (
    ("import os; os._exit(3)", "exit code 3"), ("import time; time.sleep(1000)", "no answer after 1 s"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"), ("x = bytearray(2 << 30)", "MemoryError"),
    ("import ctypes; ctypes.string_at(0)", "Segmentation fault"),
), ids=lambda text: text.rpartition(" ")[2])  # fmt: skip
def test_files_that_do_not_load(text, needle, tmp_path):
    (tmp_path / "file.py").write_text(text)
    with pytest.raises(ChildProcessError, match=needle):
        RewardFile(f"{tmp_path}/file.py:reward", 1 if "sleep" in text else 30, 1)
    assert nobody(lambda _, command: str(tmp_path) in command)


def test_a_process_imports_the_standard_library_only(tmp_path, monkeypatch):
    """It starts at once, and a file of the current folder is no part of that library."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit")
    (tmp_path / "file.py").write_text("""import sys
def reward(prompts, completions, **columns):
    return [sum(name in sys.modules for name in ("torch", "numpy", "transformers", "tyro", "common"))]
""")
    assert RewardFile("file.py:reward", 30, 1)(prompts=["a"], completions=["b"]) == [0]


def test_a_file_that_breaks_later(reward, tmp_path):
    """After a crash there is a new process, which finds another file."""
    one = reward("exits")
    (tmp_path / "hostile.py").write_text("broken")
    for text in "exit code 7", "NameError", "NameError":
        with pytest.raises(ChildProcessError, match=text):
            one(**TWO)
    (tmp_path / "hostile.py").write_text(HOSTILE)
    assert one(**TWO, fine=[1, 1]) == [0.1, 2.0]


def test_signals_to_every_process(reward):
    """A scheduler that ends a job may send SIGTERM to all of it: training decides when to stop."""
    one = reward("raises")
    process = one.child.pid
    for number in signal.SIGTERM, signal.SIGINT:
        os.killpg(process, number)
    assert one(**TWO, fine=[1, 1]) == [0.1, 2.0] and one.child.pid == process


@pytest.mark.parametrize("function", ("holds_the_gil", "hangs_with_threads_and_children"))
def test_nothing_outlives_training(function, tmp_path):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from common.rewards import RewardFile
one = RewardFile({f"{tmp_path}/hostile.py:{function}"!r}, 100, 4)
print(one.child.pid, flush=True)
one(prompts=["a"], completions=["b"])
"""
    training = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    session = int(training.stdout.readline())
    time.sleep(0.5)  # it hangs by now
    assert alive(lambda sid, _: sid == session)
    training.kill()
    training.wait()
    training.stdout.close()
    assert nobody(lambda sid, _: sid == session)


# ---- sizes, deadlines, terminals -------------------------------------------------------------------------------------

STRANGE = '''
import os, time
def long_error(prompts, completions, **columns): raise ValueError("x" * 30_000_000)
def on_the_wire(data):
    for descriptor in range(3, 20):
        try: os.write(descriptor, data)
        except OSError: pass
def floods(prompts, completions, **columns):
    for _ in range(100): on_the_wire(b"x" * 1_000_000)
    return [1.0] * len(completions)
def drips(prompts, completions, **columns):
    for _ in range(16):
        time.sleep(0.5)
        on_the_wire(b" ")
    return [1.0] * len(completions)
def named(completions, answer): return [float(len(answer)), float(answer[-1])]
def appends(prompts, completions, **columns):
    for prompt, completion in zip(prompts, completions): prompt.append(completion)
    return [float(len(prompt)) for prompt in prompts]
def sizes(prompts, completions, **columns): return [float(len(junk)) for junk in columns["junk"]]
'''


@pytest.fixture
def strange(tmp_path):
    """strange(function, timeout, memory) -> RewardFile of STRANGE, which is stopped at the end."""
    (tmp_path / "strange.py").write_text(STRANGE)
    made = []

    def make(function, timeout=30, memory=4):
        made.append(RewardFile(f"{tmp_path}/strange.py:{function}", timeout, memory))
        return made[-1]

    yield make
    for one in made:
        if one.child:
            one.stop()


def test_an_error_is_cut_before_it_travels(strange):
    with pytest.raises(ChildProcessError) as raised:
        strange("long_error")(**TWO)
    assert str(raised.value).startswith("ValueError: xxx") and len(str(raised.value)) == 1000


def test_an_answer_is_bounded_by_its_rows(strange):
    """100 MB without a line break: training reads some 65 kB of them, and the process goes."""
    one = strange("floods")
    session = one.child.pid
    with pytest.raises(ChildProcessError, match="its answer has more than 65600 bytes"):
        one(**TWO)
    assert one.child is None and nobody(lambda sid, _: sid == session)


def test_a_column_is_sent_once_per_group(strange):
    """64 completions of one row with 4 MB of text: 64 copies of it would not fit into the process."""
    one, junk = strange("sizes", memory=0.3), "x" * 4_000_000
    assert one(prompts=["a"] * 64, completions=["b"] * 64, junk=[junk] * 63 + ["short"]) == [4e6] * 63 + [5.0]


def test_a_prompt_may_be_changed_for_one_completion(strange):
    """As in TRL, where each completion has a prompt of its own."""
    assert strange("appends")(prompts=[["a"]] * 3, completions=["b", "c", "d"]) == [2.0] * 3


def test_only_the_columns_that_a_function_takes_are_sent(strange, tmp_path):
    class Secret:
        def __str__(self):
            raise AssertionError("was sent")

    given = {"prompts": ["a", "b"], "completions": ["c", "d"], "answer": ["1", "2"], "junk": [Secret(), Secret()]}
    assert strange("named")(**given) == [2.0, 2.0]
    with pytest.raises(AssertionError, match="was sent"):
        strange("sizes")(**given)
    for function, unread in ("named", {"junk"}), ("sizes", set()):
        row = Row(answer="1", junk="2")
        row.unread = {"answer", "junk"}
        args = SimpleNamespace(reward=[f"{tmp_path}/strange.py:{function}"], reward_weights=(), reward_timeout=30,
                               reward_memory=4)  # fmt: skip
        (one,) = load_rewards(args, [{"columns": row}], None)
        one.stop()
        assert row.unread == unread


def test_a_call_has_a_deadline(strange):
    """A byte every half second is no answer, however long it goes on."""
    one = strange("drips")
    one.timeout, started = 1, time.monotonic()
    with pytest.raises(ChildProcessError, match="no answer after 1 s"):
        one(**TWO)
    assert time.monotonic() - started < 3


def test_a_process_that_does_not_die_is_left_behind(strange, monkeypatch, capsys):
    """One in state D hears no SIGKILL. Here it is the wait that never sees an end."""
    one = strange("named")
    wait, child = subprocess.Popen.wait, one.child

    def never(self, timeout=None):
        assert timeout is not None, "waits for ever"
        raise subprocess.TimeoutExpired("reward", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", never)
    one.stop()
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    assert one.child is None and f"reward process {child.pid} was killed and does not end" in capsys.readouterr().err
    child.wait(10)


ESCAPE, SEEN = "\x1b]0;pwned\x07\x1b[2J", "\\x1b]0;pwned\\x07\\x1b[2J"


def test_no_terminal_obeys_what_is_printed(capsys, tmp_path):
    """Errors of rewards, names of folders, lines of the run."""
    def raises(**_):
        raise ValueError(f"cannot parse {ESCAPE}")

    groups = [{"columns": {"prompt": "p"}, "completions": [completion("a")]}]
    args = SimpleNamespace(reward=["y"], reward_weights=(), max_completion_length=9)
    reward_groups(groups, [raises], Words(), args)
    say(SimpleNamespace(bar=None, rank=0), f"resumed   {ESCAPE}")
    with pytest.raises(InputError):
        find_checkpoint(tmp_path, tmp_path / f"checkpoint-000004{ESCAPE}")
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\x07" not in out + err
    assert err == f"reward y: ValueError: cannot parse {SEEN}\n" and out.startswith(f"resumed   {SEEN}\n")
    assert f"checkpoint-000004{SEEN}: damaged" in out


# ---- odd rows --------------------------------------------------------------------------------------------------------


def test_an_odd_row_costs_its_own_reward(capsys):
    """A number of 5,000 digits is one that Python does not write."""
    assert accuracy(["?"] * 3, ["7", "7", "8"], answer=[10**5000, 7, 7]) == [None, 1, 0]
    assert "reward accuracy: 1 of 3 rows raised, the first ValueError" in capsys.readouterr().err


def test_an_odd_row_of_math(tmp_path, monkeypatch):
    """With a parser that fails where it reads `odd`, as some do on some texts."""
    parser = "def parse(text):\n    assert 'odd' not in text\n    return [text.strip('$')]\n"
    (tmp_path / "math_verify.py").write_text(parser + "def verify(gold, answer): return gold == answer\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    function = load_math()
    completions = ["7", "odd", "7", "8"]
    assert function(prompts=["?"] * 4, completions=completions, answer=["7", "7", "odd", "7"]) == [1, None, None, 0]
    function.stop()


# ---- training with them ----------------------------------------------------------------------------------------------

SHORT = ["--batch_size", 2, "--max_steps", 2, "--eval_dataset", "", "--steps_per_generation", 1, "--num_iterations", 1,
         "--beta", 0, "--num_generations", 2, "--allow", "GRPO001", "GRPO002", "GRPO003"]  # fmt: skip


def small(tmp_path, function):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    data = tiny_rows("grpo", tmp_path / "rows.jsonl", 8)
    return ["--dataset", data, *SHORT, "--reward", *function.split()]


def test_a_crash_on_one_rank_costs_one_call(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK_FILE", str(tmp_path / "died"))
    train("grpo", tmp_path / "out", *small(tmp_path, f"{tmp_path}/hostile.py:one_rank_dies"), world=2)
    shares = [row["no_reward_frac"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")]
    assert shares == [0.5, 0.0]


ROLLOUTS = ["--steps_per_generation", 2, "--max_steps", 6, "--save_every", 1, "--keep_last", 9]


def lost_in(*rollouts):
    """A patch: `accuracy` fails on all ranks in these rollouts, and pays for lengths in the others."""
    def patch(module):
        rollout, now = module.rollout, []

        def noted(policy, reference, sampler, functions, prompts, index, args, run):
            now[:] = [index]
            return rollout(policy, reference, sampler, functions, prompts, index, args, run)

        def judge(prompts, completions, **_):
            if now[0] in rollouts:
                raise RuntimeError("broken")
            return [float(len(completion[-1]["content"])) for completion in completions]

        module.rollout = noted
        rewards.BUILT_IN["accuracy"] = judge

    return patch


def weights_and_moments(checkpoint):
    return {name: tensor for name, tensor in trainer_tensors(checkpoint).items() if "/" not in name}


@pytest.mark.parametrize("world", (1, 2))
def test_a_rollout_without_rewards_is_skipped(world, tmp_path):
    """Not a bit of weights and moments changes in its steps, the KL's gradient or not; its prompts are not sampled
    again; the run goes on, and a resume from its middle ends in the same bytes."""
    flags = [*small(tmp_path, "accuracy"), *ROLLOUTS, "--beta", 0.1, "--max_completion_length", 8]
    train("grpo", tmp_path / "out", *flags, world=world, patch=lost_in(0, 2))
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    lost = [row["step"] for row in rows if row["no_reward_frac"] == 1]
    assert lost == [1, 2, 5, 6] and [row["reward"] is None for row in rows] == [row["step"] in lost for row in rows]
    states = [weights_and_moments(tmp_path / "out" / f"checkpoint-{step:06d}") for step in range(1, 7)]
    base = load_file(ROOT / "common" / "tiny" / "model" / "model.safetensors")
    for name, tensor in base.items():
        found = states[0].get(f"model.policy.lm.{name}", states[0].get(f"model.policy.{name}"))
        assert torch.equal(found, tensor), name
    assert not any(tensor.any() for name, tensor in states[0].items() if name.startswith("optim."))
    for step in range(2, 7):
        same = all(torch.equal(states[step - 1][name], states[step - 2][name]) for name in states[0])
        assert same == (step in lost), step
    samples = read_jsonl(tmp_path / "out" / "samples.jsonl")
    rows_of = [{row["row"] for row in samples if row["step"] == step} for step in (1, 3, 5)]
    assert all(len(rows) == 4 for rows in rows_of) and not rows_of[0] & rows_of[1]  # two rollouts are one epoch
    alerts = [a for a in read_jsonl(tmp_path / "out" / "alerts.jsonl") if a["code"] == "GRPO003"]
    assert [(a["step"], a["level"], a["value"]) for a in alerts] == [(1, "error", 1), (5, "error", 1)]

    shutil.copytree(tmp_path / "out", tmp_path / "again")
    for name in "final", *(f"checkpoint-00000{step}" for step in (2, 3, 4, 5, 6)):
        shutil.rmtree(tmp_path / "again" / name)
    train("grpo", tmp_path / "again", *flags, "--resume", "auto", world=world, patch=lost_in(0, 2))
    for name in "metrics.jsonl", "alerts.jsonl", "samples.jsonl":
        assert read_jsonl(tmp_path / "again" / name) == read_jsonl(tmp_path / "out" / name)
    again = weights_and_moments(tmp_path / "again" / "checkpoint-000006")
    assert all(torch.equal(again[name], states[5][name]) for name in states[5])


def test_a_skipped_step_leaves_nothing_to_add_up():
    """Tensor parallelism sums gradients of layers that it left whole: there are none."""
    policy = SimpleNamespace(partial=[torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    policy.partial[0].weight.grad = torch.ones(2, 2)
    assert partial_parameters(policy) == [policy.partial[0].weight]


def test_the_third_rollout_without_rewards_ends_the_run(tmp_path):
    """Of rollouts, not of steps, also where it was resumed between them."""
    flags = [*small(tmp_path, "accuracy"), *ROLLOUTS, "--max_steps", 10, "--max_completion_length", 8]
    (said,) = try_train("grpo", tmp_path / "out", *flags, patch=lost_in(1, 2, 3))
    assert said.error.startswith("HealthError: GRPO003: three rollouts in a row")
    assert len(read_jsonl(tmp_path / "out" / "metrics.jsonl")) == 6
    shutil.rmtree(tmp_path / "out" / "checkpoint-000006")
    (said,) = try_train("grpo", tmp_path / "out", *flags, "--resume", "auto", patch=lost_in(1, 2, 3))
    assert said.error.startswith("HealthError: GRPO003: three rollouts in a row")
    assert len(read_jsonl(tmp_path / "out" / "metrics.jsonl")) == 6


def test_an_async_function_is_awaited(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("""import asyncio
async def judge(completion):
    await asyncio.sleep(0.3)
    return len(completion)
async def reward(prompts, completions, **columns):
    return list(await asyncio.gather(*map(judge, completions)))
""")
    begun = time.monotonic()
    assert RewardFile(f"{path}:reward", 20, 0)(prompts=["p"] * 20, completions=["ab", "c"] * 10) == [2, 1] * 10
    assert time.monotonic() - begun < 5  # one after the other they would take 6 seconds


def test_rewards_are_computed_while_the_next_are_sampled(monkeypatch):
    """The first part's rewards wait for the second part's sampling: without an overlap they would wait for ever."""
    begun, sampled, judged, said = threading.Event(), [], [], []

    def sample(groups, copies, place, greedy):
        sampled.append((groups, copies, place, greedy))
        if len(sampled) > 1:
            begun.set()

    def judge(groups, functions, tokenizer, args):
        assert begun.wait(20) and (functions, tokenizer, args) == (["function"], "tokenizer", "args")
        judged.append(groups)
        return int(groups == [5]), "wrong" if groups == [3, 4] else None

    sampler = SimpleNamespace(sample=sample, tokenizer="tokenizer")
    run = SimpleNamespace(args="args", lost_calls=False)
    monkeypatch.setattr(rewards, "all_most", lambda run, value: value)
    monkeypatch.setattr(rewards, "reward_groups", judge)
    monkeypatch.setattr(rewards, "agree", lambda run, error: said.append(error))
    parts = [[1, 2], [3, 4], [5]]  # two groups of 128 are 256 sequences
    rewards.sample_and_judge(run, sampler, [1, 2, 3, 4, 5], 128, ["function"], ("train", 0))
    assert judged == parts and said == ["wrong"] and run.lost_calls
    assert sampled == [(part, 128, ("train", 0), False) for part in parts]
    rewards.sample_and_judge(run, sampler, [1], 1, ["function"], ("eval",), greedy=True)
    assert said == ["wrong", None] and sampled[-1] == ([1], 1, ("eval",), True)


class Words:
    """A tokenizer of which an id is a letter, and 0 is special."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i) for i in ids if i or not skip_special_tokens)


def completion(text, stopped=True):
    return {"ids": array("i", [*map(ord, text), 0]), "stopped": stopped}


def test_what_a_function_gets():
    """TRL's names, a value for each completion; what a column lacks in a row is None; texts, or messages where the
    prompt is messages. No column of the data can stand where a completion belongs."""
    seen, chat = [], [{"role": "user", "content": "?"}]
    plain = {"prompt": "one", "answer": "1", "completion": "not this", "completion_ids": "nor this"}
    groups = [{"columns": plain, "completions": [completion("a"), completion("bc")]},
              {"columns": {"prompt": chat, "level": 5}, "completions": [completion("d")]}]  # fmt: skip
    args = SimpleNamespace(reward=["f"], reward_weights=(), max_completion_length=9)
    assert reward_groups(groups, [lambda **columns: seen.append(columns) or [1, 2, 3]], Words(), args) == (0, None)
    assert seen == [{
        "prompts": ["one", "one", chat], "completions": ["a", "bc", [{"role": "assistant", "content": "d"}]],
        "answer": ["1", "1", None], "level": [None, None, 5], "completion_ids": [[97, 0], [98, 99, 0], [100, 0]],
        "max_completion_length": 9,
    }]  # fmt: skip
    assert [c["reward"] for group in groups for c in group["completions"]] == [1, 2, 3]


def test_rewards_are_added_up(capsys):
    """The weighted sum of what there is; NaN is not 0. A function that raises gives nothing, and the others count."""
    def raises(**_):
        raise KeyError("column")

    functions = [lambda **_: [0.1, None, math.inf], raises, lambda **_: [True, 2, None]]
    groups = [{"columns": {"prompt": "p"}, "completions": [completion("a"), completion("b"), completion("c")]}]
    args = SimpleNamespace(reward=["x", "y", "z"], reward_weights=(3.0, 5.0, 0.5), max_completion_length=9)
    assert reward_groups(groups, functions, Words(), args) == (1, None)
    nan, found = math.nan, groups[0]["completions"]
    assert repr([c["rewards"] for c in found]) == repr([[0.1, nan, 1.0], [nan, nan, 2.0], [nan, nan, nan]])
    assert repr([c["reward"] for c in found]) == repr([3.0 * 0.1 + 0.5, 1.0, nan])
    assert capsys.readouterr().err == "reward y: KeyError: 'column'\n"
    wrong = "--reward y must return a list of 3 numbers (or None), one for each completion."
    assert reward_groups(groups, [functions[0], lambda **_: None, raises], Words(), args) == (0, wrong)


def test_metrics_of_a_rollout():
    """Means over all ranks' completions; a group is silent when its rewards are equal, or absent."""
    def group(*values):
        return {"completions": [completion("ab", stopped=value != 2) | {"reward": value} for value in values]}

    groups = [group(1.0, 1.0), group(0.0, math.nan), group(math.nan, math.nan), group(2.0, 0.1)]
    wanted = {"reward": 4.1 / 5, "silent_frac": 0.75, "no_reward_frac": 1 - 5 / 8, "truncated_frac": 1 / 8}
    assert rollout_metrics(groups) == wanted | {"completion_len": 3.0}
    nothing = rollout_metrics([group(math.nan)])
    assert math.isnan(nothing["reward"]) and nothing["no_reward_frac"] == 1  # not a reward of 0
    assert repr(reward_table(groups).tolist()) == "[[1.0, 1.0], [0.0, nan], [nan, nan], [2.0, 0.1]]"
    several = [{"completions": [{"rewards": [1.0, 0.1]}, {"rewards": [2.0, 3.0]}]}]
    assert reward_table(several, "rewards").tolist() == [[[1.0, 0.1], [2.0, 3.0]]]


def judged_groups(*groups):
    """Each group as its completions' (values of two functions): their sum is the reward, as reward_groups sets it."""
    made = []
    for group in groups:
        completions = []
        for values in group:
            numbers = [value for value in values if value is not None]
            rewards = [math.nan if value is None else value for value in values]
            completions.append({"ids": [7, 8], "rewards": rewards, "reward": sum(numbers) if numbers else math.nan})
        made.append({"completions": completions})
    return made


def test_what_has_no_reward_is_not_wrong(monkeypatch):
    """Held-out prompts: right, wrong, none at all, none of the first function, and one of two samples without."""
    monkeypatch.setattr(rewards, "all_sum", lambda run, *values: values)
    greedy = judged_groups([(1.0, 0.0)], [(0.0, 0.0)], [(None, None)], [(None, 2.0)])
    wanted = {"eval/accuracy": 1 / 2, "eval/completion_len": 2, "eval/no_reward_frac": 1 / 4}
    assert heldout_metrics(None, greedy) == wanted
    sampled = judged_groups([(None, None), (1.0, 0.0)], [(0.0, 0.0), (None, None)], [(None, None), (None, None)])
    assert heldout_metrics(None, sampled) == wanted | {"eval/no_reward_frac": 1 / 3}
    assert math.isnan(heldout_metrics(None, greedy[2:])["eval/accuracy"])  # neither 0 nor an error


def test_every_held_out_prompt_has_its_place(monkeypatch):
    """By which its noise differs, also from that of the same prompt on another rank; GRPO003 takes the worse share."""
    module, run, said = script("grpo"), SimpleNamespace(dp_size=2, lost_calls=False), []
    judged = {0: [], 1: []}

    def judge(run, sampler, groups, copies, functions, place, greedy=False):
        judged[run.dp_rank].extend(group["place"] for group in groups)
        for group in groups:
            rewards = math.nan if group["place"] == 0 and not greedy else 1.0
            group["completions"] = [{"ids": [7], "rewards": [rewards], "reward": rewards}] * copies

    for name in "refresh", "show_groups":
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(module, "sample_and_judge", judge)
    monkeypatch.setattr(rewards, "check", lambda run, code, **more: said.append((code, more["step"], more["value"])))
    monkeypatch.setattr(rewards, "all_sum", lambda run, *values: values)
    heldout = [{"prompt": [7, 8], "completions": []}] * 6
    for run.dp_rank in 0, 1:
        args, sampler = SimpleNamespace(eval_samples=3), SimpleNamespace(tokenizer=None)
        metrics = module.evaluate(None, sampler, heldout, [], 5, args, run)
        assert (metrics["eval/accuracy"], metrics["eval/pass@3"], metrics["eval/no_reward_frac"]) == (1, 1, 0)
    assert sorted(judged[0] + judged[1]) == sorted([*range(6), *range(6)]) and not {*judged[0]} & {*judged[1]}
    assert sorted(said) == [("GRPO003", 5, 0), ("GRPO003", 5, 1 / 3)]


def test_samples_are_written(tmp_path):
    """One line for each completion, by rank 0, in the order of the groups; special tokens are shown."""
    more = {"reward": math.nan, "advantage": 0.5, "rewards": [math.nan, 1.0]}
    completions = [completion("ab") | more, completion("c", stopped=False) | more | {"reward": 2.0}]
    groups = [{"prompt": array("i", [112]), "row": 3, "completions": completions}]
    decode = SimpleNamespace(decode=lambda ids: Words().decode(ids, False))
    for rank in 0, 1:
        write_samples(SimpleNamespace(rank=rank, out=tmp_path), 7, groups, decode)
    line = {"step": 7, "row": 3, "prompt": "p", "completion": "ab\0", "reward": None, "advantage": 0.5}
    first, second = read_jsonl(tmp_path / "samples.jsonl")
    assert first == line | {"parts": [None, 1.0], "stop": "stop"}
    assert second == line | {"completion": "c\0", "reward": 2.0, "parts": [None, 1.0], "stop": "length"}


def test_built_in_rewards():
    chat = [{"role": "assistant", "content": "so \\boxed{1,000.0}"}]
    texts = ["#### 7", "7 #### 8\n9", chat, "it is 1000, or .5", "no number", "#### none, not 3"]
    golds = [7, "x #### 7", "1000", "0.5", "3", "3"]
    assert accuracy(golds, texts, answer=golds) == [1, 0, 1, 1, 0, 1]
    assert accuracy(golds, texts, solution=golds) == [1, 0, 1, 1, 0, 1]
    assert accuracy(golds, texts) == [None] * 6
    assert accuracy(["p"] * 3, ["1"] * 3, answer=[None, "unknown", [{"content": "1"}]]) == [None, None, 1]
    assert ends_in_number(golds, texts) == [1, 0, 0, 0, 0, 0]
    assert ends_in_number(["p"] * 2, ["####-1,000.5 \n", [{"content": "#### .5"}]]) == [1, 1]


# A column's text, and the number that it is. None: it is not one number.
GOLDS = [
    ("72", 72), (72, 72), (72.0, 72), ("x #### 72", 72), ("\\boxed{72}", 72), (" 72. ", 72), ("72.00", 72),
    ("1,000", 1000), ("1{,}000", 1000), ("$72", 72), ("-$72", -72), ("$-72$", -72), ("72%", 72), ("72\\%", 72),
    ("\u221272", -72), ("+72", 72), (".5", 0.5), (1e-05, 1e-05), (["72"], 72), ([{"content": "72"}], 72),
    ("3/4", None), ("(1, 2)", None), ("1,2", None), ("\\frac{1}{2}", None), ("\\boxed{\\frac{1}{2}}", None),
    ("2x", None), ("x^2", None), ("\\sqrt{2}", None), ("2\\pi", None), ("3:4", None), ("3 million", None), ("", None),
    (None, None), (["3", "4"], None), ([3, 4], None), ([], None), ({"a": 1}, None), (True, None),
    (math.nan, None), ("7 #### 3/4", None),
]  # fmt: skip


@pytest.mark.parametrize("gold, number", GOLDS)
def test_a_gold_that_is_not_one_number_is_none(gold, number):
    right, wrong = f"#### {number}", f"#### {number}1"
    wanted = [None, None] if number is None else [1, 0]
    assert accuracy(["?"] * 2, [right, wrong], answer=[gold] * 2) == wanted
    assert accuracy(["?"], ["no number"], answer=[gold]) == wanted[1:]


# A completion, and the only number that it may be paid for.
FINALS = [
    ("7/4", None), ("#### 7/4", None), ("\\boxed{7/4}", None), ("it is 7 / 4.", None), ("(3, 4)", None), ("3, 4", None),
    ("\\frac{3}{4}", None), ("$\\frac{3}{4}$", None), ("\\boxed{\\frac{3}{4}}", None), ("\\boxed{3, 4}", None),
    ("\\sqrt{4}", None), ("x^4", None), ("10^{4}", None), ("4x", None), ("4\\pi", None), ("2:4", None), ("7 - 4", None),
    ("7-4", None), ("#### 4 million", None), ("#### 3 or 4", None), ("1,4", None), ("4/x", None), ("2 \u00d7 4", None),
    ("4", 4), ("4.", 4), ("4.0", 4), ("#### 4", 4), ("####4\n9", 4), ("#### 4 apples", 4), ("\\boxed{4}", 4), ("$4", 4),
    ("\\boxed{4\\text{ cm}}", 4), ("4%", 4), ("4\\%", 4), ("2*2=4", 4), ("2 * 2 = 4", 4), ("it is **4**.", 4),
    ("\\(4\\)", 4), ("<answer>4</answer>", 4), ("x = 3.\n\n4", 4), ("#### Step 1\n\\boxed{4}", 4), ("4^\\circ", 4),
    ("-4", -4), ("\u22124", -4), ("#### -4", -4), ("$-4$", -4), ("1,004", 1004), ("9007199254740993", 9007199254740993),
]  # fmt: skip


@pytest.mark.parametrize("text, number", FINALS)
def test_a_part_of_an_answer_is_not_paid(text, number):
    for gold in {3, 4, -4, 7, 34, 1004, 9007199254740992, 9007199254740993}:
        assert accuracy(["?"], [text], answer=[str(gold)]) == [float(gold == number)], gold


# ---- math-verify -----------------------------------------------------------------------------------------------------


def load_math():
    args = SimpleNamespace(reward=["math"], reward_weights=[], reward_timeout=60, reward_memory=8)
    return load_rewards(args, [{"columns": Row(answer="7")}], None)[0]


def test_math_reads_what_is_no_number():
    """Values of the package itself, in the process of a reward file."""
    pytest.importorskip("math_verify")
    function = load_math()
    cases = [("3/4", "#### 7/4", 0), ("3/4", "it is 0.75", 1), ("(1, 2)", "$(3, 2)$", 0), ("(1, 2)", "$(1, 2)$", 1),
             ("\\frac{1}{2}", "\\boxed{\\frac{3}{2}}", 0), ("so \\boxed{\\frac12}", "\\boxed{1/2}", 1),
             ("x #### 72", "5 #### 72", 1), ("2\\sqrt{3}", [{"role": "assistant", "content": "$\\sqrt{12}$"}], 1),
             (None, "1", None), ("", "1", None)]  # fmt: skip
    golds, completions, wanted = (list(values) for values in zip(*cases))
    for column in "answer", "solution":
        assert function(prompts=["?"] * len(cases), completions=completions, **{column: golds}) == wanted
    function.stop()


def test_math_is_missing(monkeypatch, tmp_path):
    """One line that says what to install."""
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match="--reward math: .* pip install math-verify"):
        load_math()


def test_a_reward_process_has_one_thread(monkeypatch, tmp_path):
    """Stacks and arenas of 64 threads would take the address space that --reward_memory leaves."""
    text = "import os\ndef threads(completions, **_):\n    return [float(os.environ[name]) for name in completions]\n"
    (tmp_path / "reward.py").write_text(text)
    for name in "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS":
        monkeypatch.delenv(name, raising=False)
    function = RewardFile(f"{tmp_path / 'reward.py'}:threads", 60, 8)
    assert function(prompts=["?"] * 2, completions=["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]) == [1.0, 1.0]
    function.stop()


# ---- what a function may return --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluates(tmp_path_factory):
    """One process of a reward file for all expressions: its imports take a second."""
    path = tmp_path_factory.mktemp("evaluates") / "mine.py"
    path.write_text("import numpy as np, torch\ndef reward(prompts, completions, text, **_):\n    return eval(text)")
    one = RewardFile(f"{path}:reward", 60, 0)
    yield one
    one.stop()


@pytest.mark.parametrize("values", [
    "np.array([0.5, 2])", "np.array([0.5, 2], np.float32)", "[np.float32(0.5), np.int64(2)]", "torch.tensor([0.5, 2])",
    "[torch.tensor(0.5), torch.tensor([2])]", "torch.tensor([0.5, 2.0], dtype=torch.bfloat16)", "(0.5, 2)",
    "[np.array(0.5), 2]", "[np.float64(0.5), None]", "np.array([0.5, np.nan])",
])  # fmt: skip
def test_numbers_of_numpy_and_torch(values, evaluates):
    """As TRL allows them, also where the function runs in a process of its own."""
    assert repr(evaluates(**TWO, text=values)) in ("[0.5, 2.0]", "[0.5, None]", "[0.5, nan]")


@pytest.mark.parametrize("values", ["np.ones((2, 1))", "np.ones(3)", "np.float32(1)", "torch.ones(2, 2)"])
def test_arrays_of_another_shape(values, evaluates):
    assert evaluates(**TWO, text=values) is None


LENGTHS = {"completions": ["#### 1"] * 3 + ["#### 2"] * 4 + ["#### 1"], "max_completion_length": 20}


def test_length_rewards():
    """Limit 20, the last 4 tokens punished: free up to 16, then a quarter per token. Half a cosine: 1 at length 0,
    0.75 at half, 0.5 at the limit; wrong: the other sign. Trigrams: 2 of 2 are new; 1 of 3; 3 of 4; none."""
    path = ROOT / "common" / "examples" / "length_rewards.py"
    spec = importlib.util.spec_from_file_location("length_rewards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ids = [[7] * n for n in (1, 16, 17, 18, 19, 20, 25, 0)]
    assert module.soft_overlong(**LENGTHS, completion_ids=ids) == [0, 0, -0.25, -0.5, -0.75, -1, -1, 0]
    ids = [[7] * n for n in (0, 10, 20, 0, 10, 20, 30, 5)]
    got = module.cosine(**LENGTHS, completion_ids=ids, answer=["So: 1"] * 7 + ["?"])
    assert got[:7] == pytest.approx([1, 0.75, 0.5, -1, -0.75, -0.5, -0.5]) and got[7] is None
    chat = [[{"role": "assistant", "content": "1,000.5"}]]
    assert module.cosine(chat, [[7]], 10**9, answer=["1000.50"]) == pytest.approx([1])
    ids = [[1, 2, 3, 4], [1, 1, 1, 1, 1], [1, 2, 3, 1, 2, 3], [1, 2], []]
    assert module.repetition(None, completion_ids=ids) == pytest.approx([0, -2 / 3, -1 / 4, 0, 0])


def test_a_file_gives_what_a_function_gives(tmp_path):
    """Bitwise, thirds included."""
    function = f"{tmp_path}/hostile.py:accuracy_again"
    train("grpo", tmp_path / "file", *small(tmp_path, function), "--max_completion_length", 40)

    def patch(module):
        space = {}
        exec(HOSTILE, space)
        rewards.BUILT_IN["accuracy"] = space["accuracy_again"]

    train("grpo", tmp_path / "function", *small(tmp_path, "accuracy"), "--max_completion_length", 40, patch=patch)
    a, b = (read_jsonl(tmp_path / out / "samples.jsonl") for out in ("file", "function"))
    assert a == b and {row["reward"] for row in a} == {0.0, 1 / 3}
    assert (read_jsonl(tmp_path / "file" / "metrics.jsonl")) == read_jsonl(tmp_path / "function" / "metrics.jsonl")


def test_a_signal_to_the_group_during_a_reward(tmp_path):
    """Ctrl-C while a reward function runs: the step ends with its rewards, is saved, and exit code 4."""
    flags = [*small(tmp_path, f"{tmp_path}/hostile.py:slow"), "--max_steps", 9]
    training = command("grpo", tmp_path / "out", *flags)
    os.setpgid(training.pid, training.pid)
    while not (tmp_path / "slow").exists() and training.is_alive():
        time.sleep(0.05)
    os.killpg(training.pid, signal.SIGINT)
    code, said = ended(training)
    assert code == 4 and "stopped and saved after step 2" in said, said
    assert [row["no_reward_frac"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")] == [0.0, 0.0]
