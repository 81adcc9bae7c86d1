"""A reward that runs code the model wrote: 1 where the last ```python block of a completion passes the row's `tests`.

    python methods/grpo.py --model DIR --dataset FILE --reward_timeout 300 \\
        --reward common/examples/code_reward.py:passes

Copy it with its two neighbours: code_judge.py runs code and tests in processes of their own, which are gone when the
verdict is there, and code_isolation.py is what stands around these.

`tests` is a string of Python or a list of assert statements. They may also end in unittest.main(), but they have to
call what they test: a row whose tests are missing, broken or call nothing gives None, no reward, which is not a reward
of 0. So does a machine without isolation, and a completion that was not allowed to finish because others had the cores.
Names that the tests use and neither define nor import are the code's: `from math import isclose` belongs into them.

Where isolation by namespaces is refused, CODE_REWARD_ALLOW_WEAK=1 runs with limits only (another user id where training
is root, no further processes, no sockets): the disk, readable files and, without root, all that the user owns, its
processes included, are open.

Not a security boundary: the kernel is shared, and a bug of it is a way out. Put training that executes code into a
container or virtual machine of its own. Not covered either: timing as a side channel, tests so weak that wrong code
passes them, and tests that need more than plain values (arguments changed in place, objects, generators).
"""
import functools
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

SECONDS = 5  # of CPU for a completion with its tests
WALL = 3 * SECONDS  # of patience with one that shares its core with others, or sleeps
CALL = 240  # seconds for all completions of a call; --reward_timeout must be longer
ALLOW_WEAK = os.environ.get("CODE_REWARD_ALLOW_WEAK") == "1"
JUDGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "code_judge.py")


def passes(prompts, completions, tests=None, **_):
    """1 where the code passes, 0 where it does not or there is none, None where nobody can say."""
    isolation = level()
    count = len(completions)
    if isolation is None or tests is None:
        return [None] * count
    cores = len(os.sched_getaffinity(0))
    workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # every rank of a machine has rewards
    end = time.monotonic() + CALL

    def score_one(index):
        left = end - time.monotonic()
        share = left * workers / (count - index + workers)  # many endless ones leave time for those that follow
        try:
            return score(isolation, completions[index], tests[index], min(left, share, WALL))
        except Exception as e:  # an odd row costs its own reward only
            print(f"code_reward: a row raised {type(e).__name__}: {str(e)[:200]!a}", flush=True)
            return None

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(score_one, range(count)))


def score(isolation, completion, tests, patience):
    if isinstance(tests, list) and all(isinstance(line, str) for line in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str) or not tests.strip() or patience <= 0:
        return None
    text = completion[-1]["content"] if isinstance(completion, list) else completion
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    if not blocks:
        return 0.0
    verdict, _ = judged(isolation, blocks[-1], tests, patience)
    if verdict == "passed":
        return 1.0
    if verdict == "failed" or (verdict == "idle" and patience == WALL):
        return 0.0
    return None


def judged(isolation, code, tests, patience):
    """-> the verdict of code_judge.py, and what memory is bounded by."""
    command = [sys.executable, "-I", "-S", JUDGE, isolation, str(SECONDS), str(patience)]
    job = json.dumps([code, tests])
    pipes = {"input": job, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:  # a session of its own, so that a kill of ours lets it clean up
        done = subprocess.run(command, **pipes, cwd="/", env={}, start_new_session=True, timeout=patience + 10)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{type(e).__name__} of the judge", ""
    verdict, _, memory = done.stdout.partition("\n")
    return verdict or f"exit code {done.returncode} of the judge", memory


@functools.cache
def level():
    """What stands between the code and this machine, found out by trying, said once. None: too little."""
    for name in ["namespaces", "limits only"][: 1 + ALLOW_WEAK]:
        answer, memory = judged(name, "def one(): return 1", "assert one() == 1", patience=60)
        if answer == "passed":
            print(f"code_reward: isolation by {name}, limits by {memory}", flush=True)
            return name
    print(f"code_reward: no rewards, for code cannot be isolated here ({answer}). Allow user namespaces, or in a "
          "container that holds nothing else set CODE_REWARD_ALLOW_WEAK=1", flush=True)  # fmt: skip
    return None
