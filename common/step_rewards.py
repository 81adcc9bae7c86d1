"""Process rewards: how good each step of a completion is, by a classifier of tokens with two labels, wrong and right.

Steps are what a separator parts, a new line for one. Prompt, steps and separators are encoded apart and put together,
so that no token belongs to two of them. What the classifier says of a step, it says at the last token of the separator
behind that step.
"""
from pathlib import Path

import torch
from transformers import AutoModelForTokenClassification

from common.answers import last_text
from common.batches import flat_batch, pack, predicted_flags
from common.data import TEXT, Row, problem
from common.logprobs import Policy, load_judge, plain_logits
from common.runtime.run import read_json
from common.tokenization import control_pattern, encode_prompt, ids_of, load_tokenizer, make_group

MEAN = ":mean"  # behind the folder of a --reward: the mean over a completion's steps, not the least


# ---- steps to tokens -----------------------------------------------------------------------------
def separator_ids(tokenizer, separator):
    """Return the ids of the text behind each step. Tokenizers may drop it, or know no token for it."""
    ids = ids_of(tokenizer, separator)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not separator or separator not in decoded or tokenizer.unk_token_id in ids:
        raise problem("--step_separator", "the tokenizer has no token for it", separator,
                      "Type another text that stands between steps")
    return ids


def encode_steps(row, tokenizer, stops, separator, template_kwargs=None):
    """Return a group of one completion, the steps of the column `completions` with a separator (its ids) behind each.
    Scored is the last token of each separator."""
    steps = row.get("completions")
    if not isinstance(steps, list) or not steps:
        raise problem(row, "column completions is no list of steps", steps, "Type --rename old:completions")
    ids, scored = [], []
    group = encode_prompt(row, tokenizer, stops, template_kwargs)
    for step in steps:
        if not (isinstance(step, str) and TEXT.fullmatch(step)):
            raise problem(row, "a step in column completions is not text", step, "Write a list of texts")
        if control_pattern(tokenizer).search(step):
            group["spelled"] = True
        step_ids = ids_of(tokenizer, step) + separator
        ids += step_ids
        scored += [False] * (len(step_ids) - 1) + [True]
    (completion,) = make_group(row, [], ids, scored)["completions"]
    return {**group, "completions": [completion]}


# ---- the classifier ------------------------------------------------------------------------------
class StepScorer(Policy):
    """A token classifier with two labels as a function from a flat batch to {"step_logits": (M,)}, fp32: the logit of
    label 1 minus that of label 0 at each scored token, so that the probability of label 1 is their sigmoid."""

    kind = "token classifier with two labels"
    output = "step_logits"
    new = frozenset({"score.weight", "score.bias", "classifier.weight", "classifier.bias"})
    auto_class = AutoModelForTokenClassification
    head_config = {"num_labels": 2}

    def forward(self, batch, want=()):
        """The batch names the rows that predict the scored tokens; read are the rows of the tokens themselves."""
        positions = batch["position_ids"]
        segment_starts = batch["cu_seqlens_q"][batch["seq_segment"]].long()  # (S,)
        starts = segment_starts[batch["seq"]]  # (M,)
        own_rows = starts + positions[batch["rows"]] + 1 - positions[starts]
        return super().forward({**batch, "rows": own_rows}, want)

    def head(self):
        return getattr(self.lm, "score", getattr(self.lm, "classifier", None))  # GPT-2 and its like have the second

    def read(self, hidden, batch, want):
        weight, bias = self.head().weight.float(), self.head().bias
        step_logits = hidden.float() @ (weight[1] - weight[0])
        if bias is not None:
            step_logits = step_logits + (bias[1] - bias[0])
        return {"step_logits": step_logits}

    @torch.no_grad()
    def plain_answer(self, lm, groups):
        """Return the same (M,) from lm itself, one sequence at a time."""
        out = []
        for group, completion, _, logits in plain_logits(lm, groups):
            scored = [False] * len(group["prompt"]) + predicted_flags(group, completion)
            rows = torch.tensor(scored, device=logits.device).nonzero()[:, 0]
            out.append(logits[rows, 1] - logits[rows, 0])
        return torch.cat(out)


# ---- a reward ------------------------------------------------------------------------------------
def is_step_model(name):
    """Return whether a --reward names the folder of a token classifier, be it with :mean behind it."""
    config = read_json(Path(name.removesuffix(MEAN)) / "config.json")
    return "ForTokenClassification" in str(config.get("architectures"))


class StepRewardModel:
    """A token classifier with two labels, in a folder that names its separator in config.json. A completion's reward is
    the least probability of label 1 over its steps, with FOLDER:mean the mean. Every rank holds all of it. Steps are
    encoded as its training encoded them; blank ones are left out, and a completion without any is one empty step."""

    def __init__(self, name, tokens_per_microbatch, dtype=torch.float32):
        folder = name.removesuffix(MEAN)
        self.takes_mean = name.endswith(MEAN)
        self.budget = tokens_per_microbatch
        self.model = load_judge(StepScorer, folder, dtype)
        self.separator = getattr(self.model.lm.config, "step_separator", None)
        if not isinstance(self.separator, str):
            raise ValueError('its config.json does not say what parts steps, "step_separator": "\\n" for one')
        self.tokenizer = load_tokenizer(folder)
        self.separator_ids = separator_ids(self.tokenizer, self.separator)

    def steps_of(self, text):
        """Return the steps of a completion's text."""
        steps = [step for step in text.split(self.separator) if step.strip()]
        return steps or [""]

    @torch.no_grad()
    def __call__(self, prompts, completions, **_):
        groups = []
        for prompt, completion in zip(prompts, completions):
            row = Row(prompt=prompt, completions=self.steps_of(last_text(completion)))
            groups.append(encode_steps(row, self.tokenizer, (), self.separator_ids))
        for members in pack(groups, self.budget):
            batch = flat_batch(members, self.model.lm.device)
            counts = torch.bincount(batch["seq"], minlength=batch["num_seqs"]).tolist()
            probabilities = self.model(batch)["step_logits"].sigmoid().split(counts)
            for completion, steps in zip(batch["completions"], probabilities):
                completion["reward"] = (steps.mean() if self.takes_mean else steps.min()).item()
        return [group["completions"][0]["reward"] for group in groups]
