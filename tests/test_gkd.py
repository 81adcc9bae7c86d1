"""gkd.py against distillation.py: a loss at temperature 1 whatever the samplers do, and completions of the teacher.
What a divergence is, and TRL's own numbers for it, are held by test_distillation.py."""

import json

import pytest
import torch
from conftest import read_jsonl, tiny_rows, train
from test_bad_input import attempt, refused
from test_distillation import TINY, expected_norm, teacher_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "experimental/gkd"
ONE_STEP = ["--max_steps", 1, "--batch_size", 5, "--eval_every", 0, "--save_every", 0, "--eval_dataset", ""]


def first_step(folder):
    (line,) = [line for line in read_jsonl(folder / "metrics.jsonl") if "grad_norm" in line]
    return line


def test_the_loss_is_at_temperature_1(tmp_path):
    """On the data's completions, with a sampler at 0.6: transformers' loss and gradient at 1, in float64. At 0.6 both
    would be off by more than a tenth."""
    data = tiny_rows("distillation", tmp_path / "rows.jsonl", 5)
    flags = ["--dataset", data, "--lmbda", 0, "--beta", 0.5, "--temperature", 0.6, "--no-seq_kd"]
    train(NAME, tmp_path / "run", *flags, *ONE_STEP, "--tokens_per_microbatch", 100)
    line = first_step(tmp_path / "run")
    rows = [json.loads(row) for row in open(data)]
    loss, norm = expected_norm(rows, 0.5, 1.0)
    assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert abs(expected_norm(rows, 0.5, 0.6)[0] / loss - 1) > 0.1


def test_the_teacher_writes(tmp_path):
    """With --seq_kd and --lmbda 0, all but greedy: what is learned from is what transformers' greedy search makes of
    the teacher, and not what it makes of the student."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 5)
    flags = ["--dataset", data, "--seq_kd", "--lmbda", 0, "--temperature", 0.01, "--num_generations", 1]
    train(NAME, tmp_path / "run", *flags, *ONE_STEP)
    assert first_step(tmp_path / "run")["on_policy"] == 0
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 5
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    written = {}
    for name in ("teacher", "model"):
        lm = AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)
        written[name] = []
        for sample in samples:
            ids = tokenizer(sample["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
            out = lm.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
            written[name].append(tokenizer.decode(out))
    texts = [sample["completion"] for sample in samples]
    assert texts == written["teacher"] and texts != written["model"]


def test_half_of_the_steps_sample(tmp_path):
    """By default some steps take the student's completions and some the teacher's, and nothing is wrong with either."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 8)
    flags = ["--dataset", data, "--max_steps", 6, "--batch_size", 2, "--temperature", 0.9, "--eval_every", 0]
    train(NAME, tmp_path / "run", *flags)
    shares = [line["on_policy"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "on_policy" in line]
    assert set(shares) == {0, 1}
    codes = {alert["code"] for alert in read_jsonl(tmp_path / "run" / "alerts.jsonl")}
    assert "GRPO004" not in codes  # the sampler's log-probs are at 0.9, the trainer's at 1


def test_a_teacher_that_may_write_what_the_student_cannot_read(tmp_path):
    larger = teacher_folder(tmp_path / "larger", vocab_size=128)
    result = attempt(NAME, tmp_path, "--teacher", larger)
    refused(result, tmp_path, "--seq_kd: student and teacher have [103, 128] embeddings")
