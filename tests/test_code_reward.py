"""Code that a model wrote runs in processes that reach nothing, earn nothing by attacks and leave nothing behind; right
code earns its reward all the same, whoever else uses the cores. The attacks are those of benchmarks/code_attacks.py."""

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, read_jsonl, train
from test_rewards import nobody, small

from common.rewards import RewardFile

spec = importlib.util.spec_from_file_location("code_attacks", ROOT / "benchmarks" / "code_attacks.py")
code_attacks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(code_attacks)
ADD = "def add(a, b=1):\n    return a + b"


@pytest.fixture
def enclosed(tmp_path):
    """A copy of the example with two seconds of CPU for a completion, and a path that names its processes."""
    module = code_attacks.load_reward(tmp_path)
    module.SECONDS, module.WALL = 2, 6
    if not module.level():
        pytest.skip("this machine allows no namespaces")
    return module


def fenced(code):
    return [{"role": "assistant", "content": f"Of course.\n```python\n{code}\n```\nDone."}]


def judged(module, cases):
    """{name: (code, tests)} -> {name: reward}."""
    codes, tests = zip(*cases.values())
    return dict(zip(cases, module.passes(list(codes), [fenced(code) for code in codes], tests=list(tests))))


def rewritten(folder, name, old, new):
    """The example with one of its texts changed."""
    for path in code_attacks.EXAMPLES.glob("code_*.py"):
        shutil.copy(path, folder)
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    found = importlib.util.spec_from_file_location("code_reward_copy", folder / "code_reward.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


# ---- what is right ---------------------------------------------------------------------------------------------------

UNITTEST = """import unittest
class Cases(unittest.TestCase):
    def test_sum(self): self.assertEqual(add(1, 2), 3)
"""


def test_code_is_judged(enclosed):
    plain = "{1: (x, {2}), 'a': [None, b'b', 1.5, True], (3,): frozenset([4]), 'c': float('nan'), '': 10**99}"
    factorial = "import math\ndef f(n): return math.factorial(n)"
    known = {
        1.0: [(ADD, "assert add(1, 2) == 3"), (ADD, ["assert add(1) == 2", "assert add([1], b=[2]) == [1, 2]"]),
              (f"def f(x): return {plain}", f"x = 4\nassert repr(f(4)) == repr({plain})"),
              ("def f(x): return x / 0", "try: f(1)\nexcept ZeroDivisionError: pass\nelse: assert 0"),
              (ADD, "def check(f):\n    for i in range(9): assert f(i, i) == 2 * i\ncheck(add)"),
              (factorial, f"{factorial.replace(' f', ' g')}\nassert f(2000) == g(2000)"),
              (ADD, f"{UNITTEST}unittest.main()"), (ADD, f"{UNITTEST}if __name__ == '__main__': unittest.main()"),
              ("import math\nclass A: pass\ndef f(): return math.inf", "import math\nassert f() == math.inf")],
        0.0: [(ADD, "assert add(1, 2) == 4"), ("def add(a, b", "assert add(1, 2) == 3"), ("", "assert add(1, 2) == 3"),
              ("def abs(x): return 0\ndef f(): return 7", "assert abs(f() - 3) < 1"),
              ("def add(a, b): return 0", f"{UNITTEST}unittest.main()"),
              ("def f(): return object()", "assert f()"), ("raise SystemExit(0)", "assert add(1, 2) == 3")],
        None: [(ADD, None), (ADD, []), (ADD, "assert add(1, 2) =="), (ADD, "  "), (ADD, "import sys\nsys.exit()")],
    }  # fmt: skip
    every = {(want, i): case for want, some in known.items() for i, case in enumerate(some)}
    assert {key: value for key, value in judged(enclosed, every).items() if value != key[0]} == {}
    assert enclosed.passes(["a"] * 3, ["no code", "", "```\nx\n```"], tests=["assert 1"] * 3) == [0.0] * 3
    last = fenced("def f(): return 1")[0]["content"] + fenced("def f(): return 2")[0]["content"]
    assert enclosed.passes(["a"], [last], tests=["assert f() == 2"]) == [1.0]


def test_tests_that_call_nothing_give_no_reward(enclosed):
    """HumanEval's check() that nobody calls, pytest's functions: whatever the code, they would pass."""
    tests = {"check": "def check(candidate): assert candidate(1) == 2", "pytest": "def test_f(): assert add(1, 2) == 3",
             "none": "assert 1 + 1 == 2"}  # fmt: skip
    assert judged(enclosed, {name: (ADD, text) for name, text in tests.items()}) == dict.fromkeys(tests)


def test_odd_tests_cost_their_own_row_only(enclosed):
    odd = [5, [1], True, 1.5, ["assert 1", None], {"a": 1}]
    given = enclosed.passes(["a"] * 7, [fenced(ADD)] * 7, tests=[*odd, "assert add(1) == 2"])
    assert given == [None] * 6 + [1.0]


def test_a_row_that_raises_costs_itself(tmp_path, monkeypatch):
    """Whatever it is that raises: here what should be a completion."""
    module = code_attacks.load_reward(tmp_path)
    monkeypatch.setattr(module, "level", lambda: "any")
    monkeypatch.setattr(module, "judged", lambda *_: ("passed", ""))
    assert module.passes(["a"] * 3, [fenced(ADD), None, fenced(ADD)], tests=["assert add(1) == 2"] * 3) == [1, None, 1]


def test_iteration_does_not_end_by_the_code(enclosed):
    """As PEP 479 has it for generators: all() and zip() of the tests see an error, and not an early end."""
    raising = {kind: (f"def f(x): raise {kind}", "assert all(map(f, [2, 3, 5]))")
               for kind in ("StopIteration", "StopAsyncIteration", "GeneratorExit")}  # fmt: skip
    raising["zip"] = ("def f(x): raise StopIteration", "for got, want in zip(map(f, [1]), [1]): assert got == want")
    assert judged(enclosed, raising) == dict.fromkeys(raising, 0.0)


# ---- attacks ---------------------------------------------------------------------------------------------------------


def test_tests_are_not_where_code_can_read_them(enclosed):
    """A secret that only the tests hold, looked for in all objects, all frames and all open files."""
    code = """import gc, os, re, sys
def word():
    frame, texts = sys._getframe(), []
    while frame:
        texts, frame = texts + [str(frame.f_locals), str(frame.f_globals)], frame.f_back
    for descriptor in range(16):
        try: texts.append(os.pread(descriptor, 9999, 0).decode())
        except OSError: pass
    texts += [o for o in gc.get_objects() for o in [o, *gc.get_referents(o)] if isinstance(o, str)]
    return [found for text in texts for found in re.findall(r"sesame-[0-9]+", text)][:1]"""
    given = {"found": (code, "assert word() == ['sesame-94']"), "not there": (code, "'sesame-94'; assert word() == []"),
             "own": (f"{code}\nx = 'sesame-94'", "assert word() == ['sesame-' + '94']")}  # fmt: skip
    assert judged(enclosed, given) == {"found": 0.0, "not there": 1.0, "own": 1.0}


@pytest.mark.parametrize("kind", ["forge:", "reach:", "memo:"])
def test_attacks(enclosed, kind):
    """All that end by themselves, as the user of this test; the others and another user: test_the_campaign."""
    rows = list(code_attacks.campaign([kind], right=0))
    assert [row for row in rows if not row["held"]] == []
    assert len(rows) > 4 and {row["kind"] for row in rows} == {kind.rstrip(":"), "left"}


def test_what_never_ends(enclosed, tmp_path):
    """A second of CPU is 0, and so are two seconds of sleep. All of this kind: test_the_campaign."""
    every = code_attacks.attacks("burden", code_attacks.BURDEN, tmp_path, 0, "mark")
    enclosed.SECONDS, enclosed.WALL = 1, 30
    children = every["burden: burns with children"]  # ended by what all its processes use together
    assert judged(enclosed, {"children": (children, code_attacks.TASK)}) == {"children": 0.0}
    enclosed.WALL = 2
    names = ["ignores all signals", "outlives its judge"]
    given = judged(enclosed, {name: (every[f"burden: {name}"], code_attacks.TASK) for name in names})
    assert given == dict.fromkeys(names, 0.0)
    assert nobody(lambda _, line: f"{tmp_path}/code_" in line)


def test_no_life_beyond_its_judge(enclosed, tmp_path):
    """--reward_timeout strikes while code runs that asked not to be told: the code goes as well, and its cgroup."""
    one = RewardFile(f"{tmp_path}/code_reward.py:passes", 30, 8)
    code = fenced("import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0)\nos.fork() or os.setsid()\ntime.sleep(30)")

    def ask():
        with contextlib.suppress(Exception):  # it is stopped from outside, by the test
            one(prompts=["a"], completions=[code], tests=["assert f()"])

    call = threading.Thread(target=ask)
    call.start()
    mine = lambda _, line: f"{tmp_path}/code_" in line and "reward.py:passes" not in line  # noqa: E731
    end = time.monotonic() + 20
    while nobody(mine, 0) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1)  # now the code runs
    one.stop()
    call.join()
    assert nobody(lambda _, line: f"{tmp_path}/code_" in line)
    assert code_attacks.abandoned_groups() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="without root every candidate has a user namespace of its own")
def test_candidates_do_not_share_their_limits(enclosed, monkeypatch):
    """Six at once with four threads each are more than one user may have, so each has to be another."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    code = """import threading, time
def f():
    threads = [threading.Thread(target=time.sleep, args=(1,)) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return 1"""
    given = judged(enclosed, {number: (code, "assert f() == 1") for number in range(6)})
    assert given == dict.fromkeys(range(6), 1.0)


def test_memory_of_all_together(enclosed):
    """Three processes with 200 MB each: every one is below its own limit, and together they are above. The kernel may
    end one that has its memory already, so what counts is how many live with it."""
    _, bound = enclosed.judged("namespaces", ADD, "assert add(1) == 2", patience=30)
    if bound != "a memory cgroup":
        pytest.skip("this machine lets no memory cgroup be made")
    code = """import os
def f():
    pipes, children = [], []
    for _ in range(3):
        read, write = os.pipe()
        pipes.append(read)
        children.append(os.fork())
        if children[-1] == 0:
            kept = bytearray(b'x') * (200 << 20)
            os.write(write, b'x')
            import time
            time.sleep(30)
        os.close(write)
    for read in pipes:
        os.read(read, 1)
    return len([1 for child in children if os.waitpid(child, os.WNOHANG)[0] == 0])"""
    enclosed.WALL = 15
    assert judged(enclosed, {"all": (code, "assert f() == 3"), "one": (ADD, "assert add(1) == 2")}) == {
        "all": 0.0, "one": 1.0}  # fmt: skip


@pytest.mark.parametrize("machine", ["mips64", "riscv64"])
def test_a_machine_whose_calls_are_not_known_has_no_isolation(tmp_path, capsys, machine):
    module = rewritten(tmp_path, "code_isolation.py", "os.uname().machine", repr(machine))
    assert module.passes(["a"], [fenced(ADD)], tests=["assert add(1) == 2"]) == [None]
    assert f"no list of system calls for {machine}" in capsys.readouterr().out


def test_code_is_refused_without_isolation(tmp_path, capsys):
    """A kernel that says no: no reward, one line that says why and what to set, once."""
    module = rewritten(tmp_path, "code_isolation.py", '"unshare", NEWNS', '"unshare", 1 | NEWNS')  # 1 is no flag
    for _ in range(2):
        assert module.passes(["a"], [fenced("def f(): return 1")], tests=["assert f() == 1"]) == [None]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "unshare: Invalid argument" in said[0] and "CODE_REWARD_ALLOW_WEAK=1" in said[0]


def test_limits_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CODE_REWARD_ALLOW_WEAK", "1")
    module = rewritten(tmp_path, "code_isolation.py", '"unshare", NEWNS', '"unshare", 1 | NEWNS')
    module.SECONDS, module.WALL = 1, 6
    reach = code_attacks.attacks("reach", code_attacks.REACH, tmp_path, 0, "mark")
    names = ["gigabyte", "prints a lot", "keys", "shared memory", "other sockets", "a life of its own"]
    if os.geteuid() == 0:
        names += ["kills", "traces"]
    wanted = dict.fromkeys(names, 1.0)
    assert judged(module, {name: (reach[f"reach: {name}"], code_attacks.NOTHING) for name in names}) == wanted
    burden = code_attacks.attacks("burden", code_attacks.BURDEN, tmp_path, 0, "mark")
    assert judged(module, {"core": (burden["burden: uses a core"], code_attacks.TASK)}) == {"core": 0.0}
    assert capsys.readouterr().out.startswith("code_reward: isolation by limits only, ")
    assert nobody(lambda _, line: f"{tmp_path}/code_" in line)


# ---- neighbours and time ---------------------------------------------------------------------------------------------


@pytest.fixture
def one_core():
    """This process and what it starts share one core with three that are never idle."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    yield
    os.sched_setaffinity(0, cores)
    for neighbour in neighbours:
        neighbour.kill()
        neighbour.wait()


BUSY = "import time\ndef f():\n    while time.process_time() < 1.5: pass\n    return 1"


def test_what_was_not_allowed_to_finish_is_not_failure(enclosed, one_core):
    """Right code that may use two seconds of CPU, and got less: None, not 0."""
    enclosed.WALL = 1.5
    assert judged(enclosed, {"right": (BUSY, "assert f() == 1")}) == {"right": None}


@pytest.mark.slow
def test_a_share_of_a_core_is_enough(enclosed, one_core):
    enclosed.SECONDS, enclosed.WALL = 5, 30
    assert judged(enclosed, {"right": (BUSY, "assert f() == 1")}) == {"right": 1.0}


def test_right_code_beside_eight_busy_neighbours(enclosed):
    enclosed.SECONDS, enclosed.WALL = 5, 15
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        given = judged(enclosed, {name: (code, code_attacks.TASK) for name, code in code_attacks.RIGHT.items()})
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    assert given == dict.fromkeys(code_attacks.RIGHT, 1.0)


def test_many_endless_ones_leave_time_for_the_others(enclosed):
    """A call has a time of its own, below --reward_timeout, which would take every completion's reward."""
    enclosed.CALL = 4
    workers = len(os.sched_getaffinity(0))
    codes = ["while True: pass", "import time\ntime.sleep(30)"] * (2 * workers) + [ADD]
    started = time.monotonic()
    given = enclosed.passes(codes, [fenced(code) for code in codes], tests=["assert add(1) == 2"] * len(codes))
    assert time.monotonic() - started < 6
    assert given[-1] == 1.0 and 1.0 not in given[:-1]


def test_judges_by_the_cores_of_this_process(enclosed, monkeypatch):
    """Not by those of the machine, and ranks of one machine share them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    running, most = set(), []

    def score(*_):
        running.add(threading.get_ident())
        most.append(len(running))
        time.sleep(0.05)
        running.discard(threading.get_ident())

    monkeypatch.setattr(enclosed, "score", score)
    enclosed.passes([""] * 12, [""] * 12, tests=["a"] * 12)
    assert max(most) == 2


def test_the_example_trains(enclosed, tmp_path):
    """grpo.py with the example as it is: no column of code, but each completion gets its verdict."""
    rows = [json.loads(line) | {"tests": "assert add(1, 2) == 3"} for line in
            (ROOT / "common" / "tiny" / "prompts.jsonl").read_text().splitlines()[:8]]  # fmt: skip
    flags = small(tmp_path, f"{ROOT}/common/examples/code_reward.py:passes")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train("grpo", tmp_path / "out", *flags)
    assert {row["reward"] for row in read_jsonl(tmp_path / "out" / "samples.jsonl")} == {0.0}


@pytest.mark.slow
def test_the_campaign(enclosed, tmp_path):
    """Every attack, as this user and, where this is root, as another one, beside right answers and busy neighbours."""
    command = [sys.executable, ROOT / "benchmarks" / "code_attacks.py", "--out", tmp_path / "rows.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    rows = read_jsonl(tmp_path / "rows.jsonl")[1:]
    assert len({row["name"] for row in rows if row["kind"] in ("forge", "reach", "burden", "memo")}) >= 60


def test_the_numbers_of_the_attacks_are_those_of_the_kernel():
    """getpid through the same door, so that an attack that is refused was a call that exists."""
    number = {"x86_64": 39, "aarch64": 172}[os.uname().machine]
    assert ctypes.CDLL(None).syscall(number) == os.getpid()
