"""mopd.py: every row is scored by the teacher that it names, against transformers in float64; with one teacher it is
its parent."""

import json
import math

import pytest
import torch
from conftest import read_jsonl, tiny_rows, train
from test_bad_input import attempt, refused, write_rows
from test_distillation import TINY, differentiable, teacher_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "experimental/mopd"
STEP = ["--max_steps", 1, "--batch_size", 5, "--eval_every", 0, "--save_every", 0]
IDS = ["adds", "7", "adds", "adds", "7"]


def mixed(folder):
    """Five rows of the tiny lab, with completions, three of one teacher and two of another, whose id is a number."""
    tiny_rows("distillation", folder / "plain.jsonl", 5)
    rows = [json.loads(line) for line in open(folder / "plain.jsonl")]
    for row, name in zip(rows, IDS):
        row["teacher_id"] = 7 if name == "7" else name
    return rows, write_rows(folder, *rows)


def expected(rows, folders, beta):
    """The mean over all completion tokens of the divergence from each row's teacher, and its gradient's norm."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    load = AutoModelForCausalLM.from_pretrained
    student = load(TINY / "model", dtype=torch.float64)
    teachers = {name: load(folder, dtype=torch.float64) for name, folder in folders.items()}
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        models = student, teachers[str(row["teacher_id"])]
        p, q = [lm(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].softmax(-1) for lm in models]
        total = total + differentiable(p, q.detach(), beta).sum()
        count += len(ids) - len(prompt)
    (total / count).backward()
    return (total / count).item(), math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))


@pytest.mark.parametrize("world", (1, 2))
def test_every_row_has_its_own_teacher(world, tmp_path):
    """A step cut into micro-batches and over ranks. With the teachers exchanged it would be another loss."""
    rows, data = mixed(tmp_path)
    other = teacher_folder(tmp_path / "other")
    flags = ["--teacher", f"adds={TINY / 'teacher'}", f"7={other}", "--dataset", data, "--lmbda", 0, "--beta", 0.5]
    flags += ["--tokens_per_microbatch", 100, "--eval_dataset", data, *STEP]
    train(NAME, tmp_path / "run", *flags, world=world)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    (line,) = [line for line in lines if "grad_norm" in line]
    folders = {"adds": TINY / "teacher", "7": other}
    loss, norm = expected(rows, folders, 0.5)
    assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    exchanged, _ = expected(rows, {"adds": other, "7": TINY / "teacher"}, 0.5)
    assert abs(exchanged / loss - 1) > 0.05
    assert all(line["eval/divergence"] > 0 for line in lines if "eval/divergence" in line)


def test_one_teacher_is_its_parent(tmp_path):
    """On-policy, with and without an id: the same numbers."""
    data = tiny_rows("distillation", tmp_path / "plain.jsonl", 5)
    named = write_rows(tmp_path, *[{**json.loads(line), "teacher_id": "a"} for line in open(data)])
    found = []
    for name, rows, teacher in [("distillation", data, "tiny"), (NAME, data, "tiny"),
                                (NAME, named, f"a={TINY / 'teacher'}")]:  # fmt: skip
        out = tmp_path / f"run{len(found)}"
        train(name, out, "--dataset", rows, "--teacher", teacher, "--lmbda", 1, "--eval_dataset", "", *STEP)
        found.append([line for line in read_jsonl(out / "metrics.jsonl") if "grad_norm" in line])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("flags, needles", [
    (["--teacher", "adds=tiny"], ["mine.jsonl:2", "no --teacher is given for teacher_id", "7", "There are adds"]),
    (["--teacher", "a=tiny", "a=tiny"], ["--teacher a=tiny a=tiny", "once"]),
    (["--teacher", "a=tiny", "tiny"], ["--teacher a=tiny tiny", "one FOLDER for all"]),
    (["--teacher", "adds=tiny", "7=/no/such/folder"], ["--teacher /no/such/folder"]),
], ids=["unknown", "twice", "mixed", "missing"])  # fmt: skip
def test_teachers_that_are_refused(flags, needles, tmp_path):
    _, data = mixed(tmp_path)
    refused(attempt(NAME, tmp_path, "--dataset", data, *flags), tmp_path, *needles)


def test_rows_without_a_teacher(tmp_path):
    data = write_rows(tmp_path, {"prompt": "3+4="}, {"prompt": "4+4="})
    flags = ["--dataset", data, "--lmbda", 1, "--teacher", "adds=tiny"]
    refused(attempt(NAME, tmp_path, *flags), tmp_path, "mine.jsonl:1", "no --teacher is given for teacher_id")


def test_a_teacher_folder_with_a_link_that_leads_out(tmp_path):
    """Each folder is looked at, whatever its id."""
    _, data = mixed(tmp_path)
    folder = teacher_folder(tmp_path / "other")
    (folder / "notes.txt").symlink_to("/etc/hostname")
    result = attempt(NAME, tmp_path, "--dataset", data, "--teacher", "adds=tiny", f"7={folder}")
    refused(result, tmp_path, f"--teacher {folder}", "link that leads out")
