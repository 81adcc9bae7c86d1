"""Rewards that look at the length of completions, or at what they repeat. Examples of reward files, not measurements:

    python methods/grpo.py --reward accuracy common/examples/length_rewards.py:soft_overlong

Each takes what every reward function is given (TRL's signature): lists of prompts and completions, the columns of the
data, and of this project `completion_ids`, lists of tokens, and `max_completion_length`, the limit of their number.
"""

import math
import re


def soft_overlong(completions, completion_ids, max_completion_length, **_):
    """0 up to four fifths of the limit, from there falling to -1 at it: a penalty, to be added to what is earned.
    Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, equation 13 (limit 20480, of them the last 4096 cost)."""
    cache = max_completion_length // 5
    free = max_completion_length - cache
    rewards = []
    for ids in completion_ids:
        penalty = (free - len(ids)) / cache
        rewards.append(min(0.0, max(-1.0, penalty)))
    return rewards


def cosine(completions, completion_ids, max_completion_length, answer, **_):
    """Right answers earn 1 down to 0.5, wrong ones -1 up to -0.5, along half a cosine from 0 tokens to the limit.
    Right: the last number of the completion is the last one of the column `answer`; no reward where that holds none.
    Yeo et al. 2025, https://arxiv.org/abs/2502.03373 (the bounds are TRL's)."""

    def number(text):
        text = text[-1]["content"] if isinstance(text, list) else str(text)
        found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return float(found[-1].replace(",", "")) if found else None

    rewards = []
    for completion, text, ids in zip(completions, answer, completion_ids):
        gold = number(text)
        used = min(1.0, len(ids) / max_completion_length)
        fall = (1 + math.cos(math.pi * used)) / 2  # from 1 to 0
        size = 0.5 + 0.5 * fall
        if gold is None:
            rewards.append(None)
        elif number(completion) == gold:
            rewards.append(size)
        else:
            rewards.append(-size)
    return rewards


def repetition(completions, completion_ids, size=3, **_):
    """Minus the share of n-grams of `size` tokens that occurred before in the completion: 0 without any repetition.
    Yeo et al. 2025, https://arxiv.org/abs/2502.03373."""
    rewards = []
    for ids in completion_ids:
        count = len(ids) - size + 1
        grams = {tuple(ids[i : i + size]) for i in range(count)}
        rewards.append(len(grams) / count - 1 if count > 0 else 0.0)
    return rewards
