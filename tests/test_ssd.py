"""ssd.py: a step against transformers in float64, on the completions that the run wrote down; blank completions."""

import json
import math
from array import array

import pytest
import torch
from conftest import ROOT, newest, read_jsonl, script, tiny_rows, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME, TINY = "experimental/ssd", ROOT / "common" / "tiny"
ONE_STEP = ["--max_steps", 1, "--batch_size", 3, "--eval_every", 0, "--save_every", 1, "--eval_dataset", ""]


def expected(samples, temperature):
    """The mean over the samples' tokens of - log p at a temperature, how many there are, the norm of the mean's
    gradient and the mean entropy."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    lm = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float64)
    total, entropy, count = 0.0, 0.0, 0
    for sample in samples:
        prompt, answer = [tokenizer(sample[name], add_special_tokens=False)["input_ids"]
                          for name in ("prompt", "completion")]  # fmt: skip
        logits = lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
        logp = logits.log_softmax(-1)
        total = total - logp[range(len(answer)), answer].sum()
        entropy -= (logp.exp() * logp).sum().item()
        count += len(answer)
    (total / count).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in lm.parameters()))
    return (total / count).item(), count, norm, entropy / count


def first_is_blank(module):
    """Of every prompt the first completion becomes a space and the stop token."""
    rollout = module.rollout

    def with_blanks(sampler, prompts, copies, place, args, run):
        groups = rollout(sampler, prompts, copies, place, args, run)
        blank = [*sampler.tokenizer("  ", add_special_tokens=False)["input_ids"][:1], sampler.tokenizer.eos_token_id]
        for group in groups:
            group["completions"][0]["ids"] = array("i", blank)
            group["completions"][0]["sampler_logprobs"] = torch.zeros(2)
        return groups

    module.rollout = with_blanks


@pytest.mark.parametrize("world", (1, 2))
def test_a_step_learns_at_temperature_1_from_what_is_not_blank(world, tmp_path):
    """Sampled at 0.7 from the five likeliest tokens. The parts of a step are means over the step, not over parts."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 3)
    flags = ["--dataset", data, "--temperature", 0.7, "--top_k", 5, "--num_generations", 3, *ONE_STEP]
    train(NAME, tmp_path / "run", *flags, "--tokens_per_microbatch", 100, world=world, patch=first_is_blank)
    (line,) = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    written = [sample for sample in samples if sample["completion"].replace("<|end|>", "").strip()]
    assert len(samples) == 9 and len(written) == 6
    loss, count, norm, entropy = expected(written, 1.0)
    assert line["num_tokens"] == count and line["blank_frac"] == pytest.approx(1 / 3)
    assert line["loss"] == pytest.approx(loss, rel=1e-4)  # fp32; a confident model's loss is small
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert line["entropy"] == pytest.approx(entropy, rel=1e-4)
    for other in (expected(samples, 1.0), expected(written, 0.7)):
        assert abs(other[0] / loss - 1) > 0.02  # with the blank ones, or at the sampler's temperature


@pytest.mark.parametrize("few", [["--top_k", 1], ["--top_k", 0, "--top_p", 0.01]], ids=["top_k", "top_p"])
def test_it_samples_from_the_likeliest(few, tmp_path):
    """However hot, of one token alone there is one completion of a prompt. At that heat all tokens give several."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 3)
    flags = ["--dataset", data, "--temperature", 3, "--num_generations", 3, *ONE_STEP, "--allow", "GRPO002"]
    for name, options, different in [("few", few, 1), ("all", ["--top_k", 0, "--top_p", 1], 3)]:
        train(NAME, tmp_path / name, *flags, *options)
        samples = read_jsonl(tmp_path / name / "samples.jsonl")
        prompts = {sample["prompt"] for sample in samples}
        assert len(prompts) == 3
        for prompt in prompts:
            assert len({sample["completion"] for sample in samples if sample["prompt"] == prompt}) == different


def test_by_default_it_samples_cooler():
    """As TRL's recipe did."""
    args = script(NAME).parse_args(["--model", "a", "--dataset", "b"])
    assert (args.temperature, args.top_k, args.top_p) == (0.6, 20, 0.95)


def test_blank_is_what_has_no_text():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    texts = [["4", "", "  "], ["", " \n"], [" 7 "]]
    groups = []
    for row, group in enumerate(texts):
        completions = []
        for text in group:
            completions.append({"ids": array("i", [*tokenizer(text)["input_ids"], tokenizer.eos_token_id])})
        groups.append({"row": row, "completions": completions})
    kept = script(NAME).without_blank(groups, tokenizer)
    assert [group["row"] for group in kept] == [0, 2]
    assert [len(group["completions"]) for group in kept] == [1, 1] and len(groups[0]["completions"]) == 3


def test_a_step_of_blanks_alone_is_skipped(tmp_path):
    """SSD001, a loss of 0, and weights and moments stay where they are."""

    def patch(module):
        module.without_blank = lambda groups, tokenizer: []

    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 3)
    train(NAME, tmp_path / "run", "--dataset", data, *ONE_STEP, "--weight_decay", 0.1, patch=patch)
    (line,) = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    assert (line["loss"], line["num_tokens"], line["blank_frac"], line["grad_norm"]) == (0, 0, 1, 0)
    assert line["entropy"] > 0
    alerts = [alert["code"] for alert in read_jsonl(tmp_path / "run" / "alerts.jsonl")]
    assert alerts == ["SSD001"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    before, after = [load_file(folder / "model.safetensors") for folder in (TINY / "model", newest(tmp_path / "run"))]
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_the_model_becomes_surer(tmp_path):
    """Sampled cooler than it is: its entropy falls."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 32)
    flags = ["--dataset", data, "--max_steps", 8, "--batch_size", 8, "--learning_rate", 2e-4, "--temperature", 0.6]
    train(NAME, tmp_path / "run", *flags, "--eval_every", 0, "--save_every", 0, "--eval_dataset", "")
    entropies = [line["entropy"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "entropy" in line]
    assert sum(entropies[-2:]) < 0.8 * sum(entropies[:2])
