"""opsd.py against sdft.py, whose test holds the rest: the column solution, and the loss of a whole step by transformers
in float64, a completion at a time."""

import json
import math

import pytest
import torch
from conftest import read_jsonl, script, train
from test_bad_input import attempt, refused, write_rows
from test_distillation import TINY, differentiable
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data import Row

NAME = "experimental/opsd"
ASKS = [{"role": "user", "content": "What is 3 + 4?"}]


def solved_rows(count):
    """Demonstrations of the tiny lab, whose completion is the solution."""
    rows = [json.loads(line) for line in (TINY / "demonstrations.jsonl").read_text().splitlines()[:count]]
    return [{"prompt": row["prompt"], "solution": row["completion"][0]["content"]} for row in rows]


def expected_step(samples, rows, template, beta):
    """The loss and the norm of its gradient: of each completion the mean over its tokens, then of these the mean."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    student, teacher = (AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float64) for _ in range(2))
    total = 0.0
    for sample in samples:
        row = rows[sample["row"]]
        text = template.replace("\\n", "\n").format(prompt=row["prompt"][0]["content"], solution=row["solution"])
        answer = tokenizer(sample["completion"], add_special_tokens=False)["input_ids"]
        z = []
        for lm, content in ((student, row["prompt"][0]["content"]), (teacher, text)):
            messages = [{"role": "user", "content": content}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            z.append(lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1])
        total = total + differentiable(z[0].softmax(-1), z[1].softmax(-1).detach(), beta).mean()
    loss = total / len(samples)
    loss.backward()
    return loss.item(), math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))


@pytest.mark.parametrize("world", (1, 2))
def test_a_step_by_transformers(world, tmp_path):
    """With the template that the script has, on completions that it sampled. Its parent's default divergence, or the
    mean over all tokens at once, would be another number."""
    rows = solved_rows(4)
    data = write_rows(tmp_path, *rows)
    template = script(NAME).Args().teacher_prompt_template
    flags = ["--dataset", data, "--rename", "", "--teacher_prompt_template", template, "--max_steps", 1]
    flags += ["--batch_size", 4, "--eval_every", 0, "--save_every", 0, "--eval_dataset", "", "--max_length", 400]
    train(NAME, tmp_path / "run", *flags, "--tokens_per_microbatch", 100, world=world)
    (line,) = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 12
    loss, norm = expected_step(samples, rows, template, 1.0)
    assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    if world == 1:
        assert abs(expected_step(samples, rows, template, 0.5)[0] / loss - 1) > 0.1


def test_the_solution_stands_in_the_template():
    args = script(NAME).Args()
    assert (args.teacher_model_kind, args.distillation_mode, args.beta) == ("base", "full_logits", 1.0)
    answer = [{"role": "assistant", "content": "3+4=7"}, {"role": "assistant", "content": "#### 7 {prompt}"}]
    for solution, text in (("3+4=7", "3+4=7"), (answer, "3+4=7\n#### 7 {prompt}")):
        made = script(NAME).with_context(Row(prompt=ASKS, solution=solution), args.teacher_prompt_template)
        (turn,) = made["prompt"]
        assert turn["role"] == "user" and turn["content"].startswith(f"What is 3 + 4?\n\nThis is a solution:\n{text}\n")


@pytest.mark.parametrize("row, needles", [
    ({"prompt": ASKS, "answer": "7"}, ["wanted columns prompt + solution", "mine.jsonl:2"]),
    ({"prompt": ASKS, "solution": None}, ["null in solution", "mine.jsonl:2"]),
], ids=["absent", "null"])  # fmt: skip
def test_rows_without_a_solution(row, needles, tmp_path):
    data = write_rows(tmp_path, {"prompt": ASKS, "solution": "7"}, row)
    refused(attempt(NAME, tmp_path, "--dataset", data, "--rename", ""), tmp_path, *needles)


def test_a_template_without_the_solution(tmp_path):
    result = attempt(NAME, tmp_path, "--teacher_prompt_template", "{prompt} {privileged_context}")
    refused(result, tmp_path, "--teacher_prompt_template: must contain {solution}")
