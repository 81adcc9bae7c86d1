"""What completions are worth: built-in rewards, reward files (FILE.py:FUNCTION, see reward_files.py) and reward models.

A reward is a function with TRL's signature, reward(prompts, completions, **columns), that returns a list of numbers and
None, one for each completion. None is no reward, which is not a reward of 0.
"""
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from common.answers import NUMBER, final_number, gold_number, last_text
from common.batches import flat_batch, pack
from common.data import Row, columns_of, problem
from common.logprobs import Scorer, load_judge
from common.reward_files import RewardFile
from common.runtime.flags import HealthError, InputError, printable
from common.runtime.health import check, streak
from common.runtime.parallel import agree, all_most, all_sum, layer_dtype
from common.runtime.run import first_line, write
from common.step_rewards import StepRewardModel, is_step_model
from common.templates import write_turn
from common.tokenization import control_pattern, encode_demonstration, encode_text, ids_of, load_tokenizer, make_group
from common.tokenization import stop_ids


# ---- built-in rewards ----------------------------------------------------------------------------
def accuracy(prompts, completions, answer=None, solution=None, **_):
    """1 where a completion's final answer is the number in the column `answer` or `solution`, 0 where not, None where
    the column does not hold one number."""

    def judge(gold, completion):
        wanted = gold_number(gold)
        return None if wanted is None else float(final_number(completion) == wanted)

    return row_by_row("accuracy", judge, answer or solution or [None] * len(completions), completions)


def ends_in_number(prompts, completions, **_):
    """1 where the completion ends in `#### number`, else 0."""
    return [float(re.search(rf"####\s*{NUMBER}\s*$", last_text(text)) is not None) for text in completions]


def row_by_row(name, judge, *columns):
    """Return judge(a row's values) for every row of the columns. Data may hold anything: where it raises, None, so that
    an odd row costs its own reward only."""
    values, errors = [], []
    for row in zip(*columns):
        try:
            values.append(judge(*row))
        except Exception as e:
            values.append(None)
            errors.append(f"{type(e).__name__}: {first_line(e)}")
    if errors:
        say_lost(name, f"{len(errors)} of {len(values)} rows raised, the first {errors[0]}")
    return values


def say_lost(name, text):
    """Say on stderr, on the rank where it happens, why completions got no reward."""
    print(printable(f"reward {name}: {text}"), file=sys.stderr, flush=True)


BUILT_IN = {"accuracy": accuracy, "format": ends_in_number}
SHIPPED = {"math": str(Path(__file__).with_name("examples") / "math_reward.py") + ":equal_in_math"}


# ---- judging completions -------------------------------------------------------------------------
def load_rewards(args, groups, tokenizer):
    """Return the functions of --reward. groups: of the data set, which must have a column that `accuracy` reads.
    tokenizer: the policy's."""
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
            elif is_step_model(name):
                functions.append(StepRewardModel(name, args.tokens_per_microbatch, layer_dtype(args)))
            elif os.path.isdir(name):
                functions.append(RewardModel(name, args.tokens_per_microbatch, layer_dtype(args), tokenizer))
            elif ":" not in path:
                raise ValueError("there is no such reward")
            else:
                functions.append(RewardFile(path, args.reward_timeout, args.reward_memory))
                taken = functions[-1].takes
                columns.unread.difference_update(list(columns.unread) if taken is None else taken)
        except Exception as e:  # files and folders are input, and what loads them raises anything
            advice = f"Give {', '.join([*BUILT_IN, *SHIPPED])}, FILE.py:FUNCTION or the folder of a reward model."
            raise InputError(f"--reward {name}: {first_line(e)}. {advice}") from e
    return functions


def sample_and_judge(run, sampler, groups, copies, functions, place, greedy=False):
    """Give every group `copies` completions with their rewards, 256 completions at a time: while the next ones are
    sampled, a thread judges those before. Every rank calls this: a function's wrong answer ends the run on all, and a
    failed call sets run.lost_calls on all. Without functions there are no rewards."""
    size = max(1, 256 // copies)
    answers = []
    with ThreadPoolExecutor(1) as judge:
        for first in range(0, len(groups), size):
            part = groups[first : first + size]
            sampler.sample(part, copies, place, greedy)
            if functions:
                answers.append(judge.submit(reward_groups, part, functions, sampler.tokenizer, run.args))
        results = [answer.result() for answer in answers]
    errors = [error for _, error in results if error]
    agree(run, errors[0] if errors else None)
    if all_most(run, sum(lost for lost, _ in results)) > 0:
        run.lost_calls = True


def reward_groups(groups, functions, tokenizer, args):
    """Set completion["rewards"], a number for each function, and completion["reward"], their weighted sum. NaN where a
    function raises, hangs or says None, which is not a reward of 0. Return how many functions failed, and a text if one
    gave a wrong answer, else None."""
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
    lost = 0
    for name, function in zip(args.reward, functions):
        try:
            values = function(**columns)
        except Exception as e:  # rows may hold anything, and files do anything
            say_lost(name, f"{type(e).__name__}: {first_line(e)}")
            values = [None] * len(completions)
            lost += 1
        if values is None:
            text = f"--reward {name} must return a list of {len(rows)} numbers (or None), one for each completion."
            return lost, text
        table.append([math.nan if value is None or math.isinf(value) else value for value in values])
    rewards = torch.tensor(table, dtype=torch.float64).T.contiguous()  # (completions, functions)
    weights = torch.tensor(args.reward_weights or 1.0, dtype=torch.float64)
    sums = (weights * rewards).nansum(1)
    sums[rewards.isnan().all(1)] = math.nan
    for completion, parts, total in zip(completions, rewards.tolist(), sums.tolist()):
        completion.update(rewards=parts, reward=total)
    return lost, None


def check_rewards(run, code, step, metric, share):
    """Raise the alert `code` where completions, or held-out prompts, got no reward: `share` of them, the same number on
    all ranks. Before step 1 more than a tenth ends the run, unless a call has failed: a crash or a hang costs its own
    call only. The third rollout in a row without any reward ends the run at any time."""
    if run.lost_calls:
        step = max(1, step)
        run.lost_calls = False
    subject = "held-out prompts" if metric.startswith("eval/") else "completions"
    text = f"{subject} got no reward: it raised, hung or was None"
    check(run, code, step=step, metric=metric, value=share, message=text, warn=0, error=0.1)
    if subject == "completions" and streak(run.state, "rollouts without reward", share == 1) == 3:
        raise HealthError(f"{code}: three rollouts in a row got no reward at all. Check --reward.")


def reward_table(groups, key="reward"):
    """Return completion[key] as float64 (groups, copies), or (groups, copies, functions) for the key "rewards"."""
    table = []
    for group in groups:
        table.append([completion[key] for completion in group["completions"]])
    return torch.tensor(table, dtype=torch.float64)


def rollout_metrics(groups):
    """Return, over the groups of all ranks: the mean reward of completions that have one (NaN: none has), the share of
    groups whose rewards are all equal or absent, the shares of completions without reward or stop token, and their mean
    length."""
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
        "reward": reward_sum / num_rewards if num_rewards else math.nan,
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
            if "reward" in completion:
                parts = completion["rewards"]
                line.update(reward=completion["reward"], advantage=completion["advantage"], parts=parts)
            line["stop"] = "stop" if completion["stopped"] else "length"
            write(run, "samples.jsonl", line)


# ---- reward models -------------------------------------------------------------------------------
class RewardModel:
    """A sequence classifier with one label, in a folder as reward modelling saves it. Every rank holds all of it.
    Prompt and completion are encoded as its training encoded them, and it reads the end-of-turn token. Letters that
    spell a control token are letters: where the tokens of the policy (tokenizer: its own) are all tokens of this model,
    it reads the ids that were sampled."""

    def __init__(self, folder, tokens_per_microbatch, dtype, tokenizer):
        self.folder = folder
        self.budget = tokens_per_microbatch
        self.model = load_judge(Scorer, folder, dtype)
        self.tokenizer = load_tokenizer(folder)
        self.stops = stop_ids(self.tokenizer)
        self.reads_ids = tokenizer.get_vocab().items() <= self.tokenizer.get_vocab().items()
        if self.reads_ids:  # the same tokens; one tokenizer may still write them otherwise
            probe = ids_of(tokenizer, "Is 3 + 4 = 7?\nYes.")
            self.reads_ids = tokenizer.decode(probe) == self.tokenizer.decode(probe)

    @torch.no_grad()
    def __call__(self, prompts, completions, completion_ids, **_):
        groups = row_by_row(self.folder, self.encode, prompts, completions, completion_ids)
        for members in pack([group for group in groups if group], self.budget):
            batch = flat_batch(members, self.model.lm.device)
            for completion, reward in zip(batch["completions"], self.model(batch)["rewards"].tolist()):
                completion["reward"] = reward
        rewards = []
        for group in groups:
            rewards.append(group["completions"][0]["reward"] if group else None)
        return rewards

    def encode(self, prompt, completion, ids):
        """Return the group of a prompt and its completion, text or messages; ids: the completion's, as sampled."""
        row = Row(prompt=prompt, completion=completion)
        text = last_text(completion)
        if not self.reads_ids and not control_pattern(self.tokenizer).search(text):
            (group,) = encode_demonstration(row, self.tokenizer, self.stops)
            return group
        before, lead, ending = self.surroundings(row)
        if not self.reads_ids:
            before += ids_of(self.tokenizer, lead)
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            if not set(ids).isdisjoint(self.stops):
                raise problem(row, "the completion spells an end of turn", text, "Use one that is a special token")
        if not ids or ids[-1] != ending[-1]:
            answer = [token for token in ids if token not in self.stops]  # one is left that ends another model's turn
            ids = answer + ending
        return make_group(row, before, ids)

    def surroundings(self, row):
        """Return what stands around a row's answer: the ids before it, the text with which the chat template opens an
        answer, which a policy samples itself, and the ids that end its turn."""
        prompt, _ = columns_of(row, ["prompt", "completion"])
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token_id
            return encode_text(self.tokenizer, prompt), "", [self.stops[0] if eos is None else eos]
        messages = [*prompt, {"role": "assistant", "content": "ANSWER"}]
        opening, turn, _ = write_turn(row, self.tokenizer, self.stops, None, messages, len(prompt))
        lead, found, ending = turn.partition("ANSWER")
        if not found or not ending:
            raise problem(row, "the chat template writes no answer with an end", turn, "Use another reward model")
        return ids_of(self.tokenizer, opening), lead, ids_of(self.tokenizer, ending)
