"""What completions are worth: built-in rewards, reward files (FILE.py:FUNCTION) and reward models.

A reward is a function with TRL's signature, reward(prompts, completions, **columns), that returns a list of numbers and
None, one for each completion. A reward file runs in a process of its own: `RewardFile` is training's end of it, `serve`
the other, and the two exchange lines of JSON.
"""
import asyncio
import importlib.util
import inspect
import json
import math
import numbers
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from common.answers import NUMBER, final_number, gold_number, last_text
from common.batches import flat_batch, pack
from common.logprobs import Scorer
from common.runtime.flags import InputError
from common.runtime.parallel import agree, all_sum, layer_dtype
from common.runtime.run import first_line, write
from common.data import Row, problem
from common.tokenization import encode_demonstration, load_tokenizer, stop_ids


# ---- built-in rewards ----------------------------------------------------------------------------
def accuracy(prompts, completions, answer=None, solution=None, **_):
    """1 where a completion's final answer is the number in the column `answer` or `solution`, 0 where not, None where
    the column does not hold one number."""
    rewards = []
    for gold, completion in zip(answer or solution or [None] * len(completions), completions):
        wanted = gold_number(gold)
        rewards.append(None if wanted is None else float(final_number(completion) == wanted))
    return rewards


def ends_in_number(prompts, completions, **_):
    """1 where the completion ends in `#### number`, else 0."""
    return [float(re.search(rf"####\s*{NUMBER}\s*$", last_text(text)) is not None) for text in completions]


BUILT_IN = {"accuracy": accuracy, "format": ends_in_number}
SHIPPED = {"math": str(Path(__file__).with_name("examples") / "math_reward.py") + ":equal_in_math"}


# ---- judging completions -------------------------------------------------------------------------
def load_rewards(args, groups):
    """Return the functions of --reward. groups: of the data set, which must have a column that `accuracy` reads."""
    columns = groups[0]["columns"]
    if "accuracy" in args.reward and not {"answer", "solution"} & columns.unread:
        raise problem(columns, "--reward accuracy needs a column answer or solution; found", sorted(columns),
                      "Type --rename old:answer, or another --reward")
    if len(args.reward_weights) not in (0, len(args.reward)):
        raise InputError(f"--reward_weights: {len(args.reward_weights)} values for {len(args.reward)} rewards.")
    functions = []
    for name in args.reward:
        path = SHIPPED.get(name, name)
        try:
            if name in BUILT_IN:
                functions.append(BUILT_IN[name])
                columns.unread.difference_update(["answer", "solution"])
            elif os.path.isdir(name):
                functions.append(RewardModel(name, args.tokens_per_microbatch, layer_dtype(args)))
            elif ":" not in path:
                raise ValueError("there is no such reward")
            else:
                functions.append(RewardFile(path, args.reward_timeout, args.reward_memory))
                columns.unread.clear()  # its function gets all of them
        except Exception as e:  # files and folders are input, and what loads them raises anything
            advice = f"Give {', '.join([*BUILT_IN, *SHIPPED])}, FILE.py:FUNCTION or the folder of a reward model."
            raise InputError(f"--reward {name}: {first_line(e)}. {advice}") from e
    return functions


def sample_and_judge(run, sampler, groups, copies, functions, place, greedy=False):
    """Give every group `copies` completions with their rewards, 256 completions at a time: while the next ones are
    sampled, a thread judges those before. Every rank calls this: a function's wrong answer ends the run on all."""
    size = max(1, 256 // copies)
    answers = []
    with ThreadPoolExecutor(1) as judge:
        for first in range(0, len(groups), size):
            part = groups[first : first + size]
            sampler.sample(part, copies, place, greedy)
            answers.append(judge.submit(reward_groups, part, functions, sampler.tokenizer, run.args))
        errors = [answer.result() for answer in answers]
    agree(run, next(filter(None, errors), None))


def reward_groups(groups, functions, tokenizer, args):
    """Set completion["rewards"], a number for each function, and completion["reward"], their weighted sum. NaN where a
    function raises, hangs or says None, which is not a reward of 0. Return a text if its answer is wrong, else None."""
    completions, rows = [], []
    for group in groups:
        prompt = group["columns"]["prompt"]
        for completion in group["completions"]:
            ids = list(completion["ids"])
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            if isinstance(prompt, list):
                answer = [{"role": "assistant", "content": answer}]
            rows.append({**group["columns"], "prompts": prompt, "completions": answer, "completion_ids": ids})
            completions.append(completion)
    columns = {}
    for name in sorted(set().union(*rows) - {"prompt", "completion"}):
        columns[name] = [row.get(name) for row in rows]
    columns["max_completion_length"] = args.max_completion_length
    table = []
    for name, function in zip(args.reward, functions):
        try:
            values = function(**columns)
        except Exception as e:  # rows may hold anything, and files do anything
            print(f"reward {name}: {type(e).__name__}: {first_line(e)}", file=sys.stderr)
            values = [None] * len(completions)
        if values is None:
            return f"--reward {name} must return a list of {len(rows)} numbers (or None), one for each completion."
        table.append([math.nan if value is None or math.isinf(value) else value for value in values])
    rewards = torch.tensor(table, dtype=torch.float64).T.contiguous()  # (completions, functions)
    weights = torch.tensor(args.reward_weights or 1.0, dtype=torch.float64)
    sums = (weights * rewards).nansum(1)
    sums[rewards.isnan().all(1)] = math.nan
    for completion, parts, total in zip(completions, rewards.tolist(), sums.tolist()):
        completion.update(rewards=parts, reward=total)
    return None


def reward_table(groups, key="reward"):
    """Return completion[key] as float64 (groups, copies), or (groups, copies, functions) for the key "rewards"."""
    table = []
    for group in groups:
        table.append([completion[key] for completion in group["completions"]])
    return torch.tensor(table, dtype=torch.float64)


def rollout_metrics(groups):
    """Return, over the groups of all ranks: the mean reward of completions that have one, the share of groups whose
    rewards are all equal or absent, the shares of completions without reward or stop token, and their mean length."""
    completions = []
    num_rewards = num_silent = 0
    reward_sum = 0.0
    for group in groups:
        completions.extend(group["completions"])
        rewards = [c["reward"] for c in group["completions"] if not math.isnan(c["reward"])]
        num_rewards += len(rewards)
        reward_sum += sum(rewards)
        if len(set(rewards)) < 2:
            num_silent += 1
    return {
        "reward": reward_sum / max(1, num_rewards),
        "silent_frac": num_silent / len(groups),
        "no_reward_frac": 1 - num_rewards / len(completions),
        "truncated_frac": sum(not c["stopped"] for c in completions) / len(completions),
        "completion_len": sum(len(c["ids"]) for c in completions) / len(completions),
    }


def heldout_metrics(run, groups):
    """Return, over the groups of all ranks: the share of prompts where the first function gives 1 or more to any
    completion, of those where it gives a number (NaN where there are none); the mean length of a completion; and the
    share of prompts to which no function gives a number."""
    judged = right = silent = num_completions = num_tokens = 0
    for group in groups:
        completions = group["completions"]
        first_rewards = [c["rewards"][0] for c in completions if not math.isnan(c["rewards"][0])]
        if first_rewards:
            judged += 1
        if any(reward >= 1 for reward in first_rewards):
            right += 1
        if all(math.isnan(c["reward"]) for c in completions):
            silent += 1
        num_completions += len(completions)
        num_tokens += sum(len(c["ids"]) for c in completions)
    counts = all_sum(run, judged, right, silent, len(groups), num_completions, num_tokens)
    judged, right, silent, num_prompts, num_completions, num_tokens = counts
    return {
        "eval/accuracy": right / judged if judged else math.nan,
        "eval/completion_len": num_tokens / num_completions,
        "eval/no_reward_frac": silent / num_prompts,
    }


def write_samples(run, step, groups, tokenizer):
    """Append a line for each completion to samples.jsonl (rank 0)."""
    for group in groups:
        prompt = tokenizer.decode(group["prompt"])
        for completion in group["completions"]:
            text = tokenizer.decode(completion["ids"])
            line = {"step": step, "row": group["row"], "prompt": prompt, "completion": text}
            line.update(reward=completion["reward"], advantage=completion["advantage"], parts=completion["rewards"])
            line["stop"] = "stop" if completion["stopped"] else "length"
            write(run, "samples.jsonl", line)


# ---- reward models -------------------------------------------------------------------------------
class RewardModel:
    """A sequence classifier with one label, in a folder as reward modelling saves it. Every rank holds all of it.
    Prompt and completion are encoded as its training encoded them, and it reads the end-of-turn token."""

    def __init__(self, folder, tokens_per_microbatch, dtype=torch.float32):
        self.budget = tokens_per_microbatch
        self.device = torch.device("cpu")
        if torch.cuda.is_available():  # with its number: the thread that judges has a current device of its own, 0
            self.device = torch.device("cuda", torch.cuda.current_device())
        lm, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        if info["missing_keys"] or lm.config.num_labels != 1:
            raise ValueError("it is no sequence classifier with one label")
        self.tokenizer = load_tokenizer(folder)
        self.model = Scorer(lm.to(self.device))

    @torch.no_grad()
    def __call__(self, prompts, completions, **_):
        groups = []
        stops = stop_ids(self.tokenizer)
        for prompt, completion in zip(prompts, completions):
            row = Row(prompt=prompt, completion=completion)
            groups.extend(encode_demonstration(row, self.tokenizer, stops))
        for members in pack(groups, self.budget):
            batch = flat_batch(members, self.device)
            for completion, reward in zip(batch["completions"], self.model(batch)["rewards"].tolist()):
                completion["reward"] = reward
        return reward_table(groups)[:, 0].tolist()


# ---- reward files --------------------------------------------------------------------------------
class RewardFile:
    """The function of FILE.py:FUNCTION in a process of its own. A call returns the function's list of numbers and None,
    or None for any other answer. ChildProcessError where it raised, crashed or hung: after the last two the next call
    gets a new process. timeout: seconds of a call, memory: GB of address space. 0 of either: no limit."""

    def __init__(self, name, timeout, memory):
        self.command = [sys.executable, "-uPc", CHILD_PROGRAM, name, str(memory)]  # P: without a json.py of this folder
        self.timeout = timeout
        self.child = None
        self()  # without columns the process only loads the file

    def __call__(self, /, **columns):
        if self.child is None:
            self.wire, other_end = socket.socketpair()
            self.wire.settimeout(self.timeout or None)
            # A thread's stacks and arenas are address space, too: on 64 cores more than --reward_memory leaves.
            one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            options = {"stdin": subprocess.PIPE, "stdout": other_end, "start_new_session": True}
            options["env"] = one_thread | os.environ  # who sets them means it
            with other_end:  # a session of its own: Ctrl-C is training's to handle, and its end takes the whole group
                self.child = subprocess.Popen(self.command, **options)
        try:
            self.wire.sendall(json.dumps(columns, default=str).encode() + b"\n")  # dates and bytes become text
            answer = json.loads(self.wire.makefile("rb").readline())
        except TimeoutError as e:
            self.stop()
            raise ChildProcessError(f"no answer after {self.timeout:g} s (--reward_timeout)") from e
        except (OSError, ValueError) as e:
            code = self.stop()
            reason = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            raise ChildProcessError(f"its process ended: {reason}") from e
        if isinstance(answer, str):
            if not columns or answer.startswith("MemoryError"):
                self.stop()  # nothing is loaded, or what filled the memory may still be there
            raise ChildProcessError(answer)
        return answer

    def stop(self):
        """Kill the process group and return the exit code of its first process."""
        os.killpg(self.child.pid, signal.SIGKILL)
        self.wire.close()
        with self.child as child:  # closes its stdin and waits
            self.child = None
        return child.returncode


def serve(name, memory):
    """Answer each line, the columns of a call, with a line: a list, null where the function returned something else, or
    a text that says what went wrong. Without columns only load the function. memory: bytes, 0: no limit."""
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
    function = None
    os.register_at_fork(after_in_child=wire.close)  # where the function forks and both come back, only one may answer
    for line in wire:
        answer = None
        try:
            if function is None:
                function = load_function(path, function_name)
            columns = json.loads(line)
            if columns:
                answer = answer_to(columns, function)
        except BaseException as e:  # user code may raise anything
            answer = traceback.format_exception_only(e)[-1]
        print(json.dumps(answer), file=wire, flush=True)


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


def answer_to(columns, function):
    """Return what the function returns, if that is a list, tuple, array or tensor of numbers and None, one for each
    completion, as a list; else None."""
    count = len(columns["completions"])  # before the call, which may change what it was given
    values = function(**columns)
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
CHILD_IMPORTS = "import asyncio, importlib.util, inspect, json, numbers, os, resource, signal, socket, sys, traceback\n"
CHILD_MAIN = "serve(sys.argv[1], int(float(sys.argv[2]) * 2**30))"
CHILD_PROGRAM = CHILD_IMPORTS + "\n".join(map(inspect.getsource, (serve, load_function, answer_to))) + CHILD_MAIN
