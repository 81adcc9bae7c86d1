"""Log-probs of the reference that a run keeps: used for what they were computed for only, and a killed pass goes on."""

import copy
from array import array
from types import SimpleNamespace

import pytest
import torch
from conftest import read_jsonl, tiny_rows, train, try_train
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.logprobs import Policy
from common.runtime import checkpoint
from common.runtime.checkpoint import cache_key

SCRIPTS = ["dpo", "kto", "experimental/dpo_batch"]


def make_group():
    completions = [{"ids": array("i", [4, 5, 6]), "scored": None}, {"ids": array("i", [7, 8]), "scored": [True, False]}]
    return {"prompt": array("i", [1, 2, 3]), "completions": completions}


def make_policy(seed=0, temperature=1.0):
    config = AutoConfig.for_model("llama", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(seed)
    return Policy(AutoModelForCausalLM.from_config(config).eval(), temperature)


def change_prompt(group):
    group["prompt"][0] = 9


def change_completion(group):
    group["completions"][1]["ids"][1] = 9


def change_scored(group):
    group["completions"][1]["scored"] = [False, True]


def move_a_token(group):
    group["completions"][0]["ids"] = array("i", [4, 5])
    group["completions"][1]["ids"] = array("i", [6, 7, 8])


def move_a_token_to_the_prompt(group):
    group["prompt"].append(4)
    group["completions"][0]["ids"] = array("i", [5, 6])


CHANGES = [change_prompt, change_completion, change_scored, move_a_token, move_a_token_to_the_prompt]


def key_of(groups, policy, *settings, model="x", device="cpu"):
    run = SimpleNamespace(args=SimpleNamespace(model=model), device=torch.device(device), data="rows")
    return cache_key(run, policy, groups, *settings)


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_has_all_of_a_row(change):
    policy = make_policy()
    groups = [make_group(), make_group()]
    changed = copy.deepcopy(groups)
    change(changed[1])
    assert key_of(groups, policy, 1024) == key_of(copy.deepcopy(groups), policy, 1024) != key_of(changed, policy, 1024)


def test_the_key_has_the_model_and_the_settings():
    groups = [make_group()]
    keys = [
        key_of(groups, make_policy(), 1024),
        key_of(groups, make_policy(), 512),
        key_of(groups, make_policy(1), 1024),
        key_of(groups, make_policy(temperature=2.0), 1024),
        key_of(groups, make_policy(), 1024, model="y"),
        key_of(groups[:0], make_policy(), 1024),
        key_of(groups * 2, make_policy(), 1024),
    ]
    assert len({*keys}) == len(keys) and keys[0] == key_of(groups, make_policy(), 1024)


@pytest.mark.parametrize("name, world", [*((name, 1) for name in SCRIPTS), ("dpo", 2)])
def test_a_killed_pass_goes_on(name, world, tmp_path):
    """It ends when half of the rows are written; the run after it computes the rest only, to the same bytes."""
    data = tiny_rows(name.rpartition("/")[2].removesuffix("_batch"), tmp_path / "rows.jsonl", 16)
    flags = ["--dataset", data, "--eval_dataset", "", "--max_steps", 2, "--batch_size", 8]

    def small_parts(module):
        checkpoint.CACHE_PART = 4 // world

    def killed(module):
        small_parts(module)
        uncached = module.uncached

        def until_half(*given):
            for number, part in enumerate(uncached(*given)):
                if number == 2:
                    raise KeyboardInterrupt
                yield part

        module.uncached = until_half

    def counting(module):
        small_parts(module)
        uncached = module.uncached

        def counted(*given):
            for number, part in enumerate(uncached(*given)):
                assert number < 2, "the first half again"
                yield part

        module.uncached = counted

    train(name, tmp_path / "whole", *flags, world=world, patch=small_parts)
    assert all(result.code for result in try_train(name, tmp_path / "out", *flags, world=world, patch=killed))
    (half,) = load_file(tmp_path / "out" / "ref_logprobs_train.safetensors").values()
    (whole,) = load_file(tmp_path / "whole" / "ref_logprobs_train.safetensors").values()
    assert len(half) == 8 and len(whole) == 16 and torch.equal(half, whole[:8])
    train(name, tmp_path / "out", *flags, "--resume", "auto", world=world, patch=counting)
    (resumed,) = load_file(tmp_path / "out" / "ref_logprobs_train.safetensors").values()
    assert torch.equal(resumed, whole) and resumed.dtype == torch.float32
    losses = [[row["loss"] for row in read_jsonl(tmp_path / run / "metrics.jsonl")] for run in ("out", "whole")]
    assert losses[0] == losses[1]
