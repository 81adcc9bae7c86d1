"""mopd.py: every row is scored by the teacher that it names, against transformers in float64; with one teacher it is
its parent."""

import json
import math

import pytest
import torch
from conftest import read_jsonl, script, tiny_rows, train
from test_bad_input import attempt, refused, write_rows
from test_distillation import TINY, differentiable, swap_two, teacher_folder
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


@pytest.mark.parametrize("world, replicas", [(1, 1), (2, 1), (2, 2)])
def test_every_row_has_its_own_teacher(world, replicas, tmp_path):
    """A step cut into micro-batches and over ranks. With the teachers exchanged it would be another loss. The held-out
    rows name the student as their teacher: before the first step nothing is nearer to it."""
    rows, data = mixed(tmp_path)
    (tmp_path / "heldout").mkdir()
    heldout = write_rows(tmp_path / "heldout", *[row | {"teacher_id": "a"} for row in rows])
    other = teacher_folder(tmp_path / "other")
    flags = ["--teacher", f"adds={TINY / 'teacher'}", f"7={other}", f"a={TINY / 'model'}"]
    flags += ["--dataset", data, "--lmbda", 0, "--beta", 0.5]
    flags += ["--tokens_per_microbatch", 100, "--eval_dataset", heldout, *STEP, "--replicate_size", replicas]
    train(NAME, tmp_path / "run", *flags, world=world)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    (line,) = [line for line in lines if "grad_norm" in line]
    folders = {"adds": TINY / "teacher", "7": other}
    loss, norm = expected(rows, folders, 0.5)
    assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    exchanged, _ = expected(rows, {"adds": other, "7": TINY / "teacher"}, 0.5)
    assert abs(exchanged / loss - 1) > 0.05
    before, after = [line["eval/divergence"] for line in lines if "eval/divergence" in line]
    assert before < 1e-7 and after > 1e-6  # 1.5e-9, of rounding, and 6e-6: the step takes it away from what it was


def test_one_teacher_is_its_parent(tmp_path):
    """On-policy, with and without an id: the same numbers, held-out ones, too, at other flags than the usual."""
    data = tiny_rows("distillation", tmp_path / "plain.jsonl", 5)
    named = write_rows(tmp_path, *[{**json.loads(line), "teacher_id": "a"} for line in open(data)])
    found = []
    for name, rows, teacher in [("distillation", data, "tiny"), (NAME, data, "tiny"),
                                (NAME, named, f"a={TINY / 'teacher'}")]:  # fmt: skip
        out = tmp_path / f"run{len(found)}"
        flags = ["--dataset", rows, "--teacher", teacher, "--lmbda", 1, "--eval_dataset", rows, *STEP]
        flags += ["--temperature", 0.8, "--beta", 0.3, "--loss_top_k", 5, "--tokens_per_microbatch", 100]
        train(name, out, *flags)
        found.append(read_jsonl(out / "metrics.jsonl"))
    assert found[0] == found[1] == found[2] and len(found[0]) == 3


def test_the_defaults_are_on_policy():
    """As in TRL: the student's samples, and the divergence that on them is the gradient's."""
    args = script(NAME).parse_args(["--model", "a", "--teacher", "b", "--dataset", "c"])
    assert (args.lmbda, args.beta, args.loss_top_k) == (1.0, 1.0, 0)


@pytest.mark.parametrize("flags, needles", [
    (["--teacher", "adds=tiny"], ["mine.jsonl:2", "no --teacher is given for teacher_id", "7", "There are adds"]),
    (["--teacher", "a=tiny", "a=tiny"], ["--teacher a=tiny a=tiny", "once"]),
    (["--teacher", "a=tiny", "tiny"], ["--teacher a=tiny tiny", "one FOLDER for all"]),
    (["--teacher", "adds=tiny", "7=/no/such/folder"], ["--teacher /no/such/folder"]),
], ids=["unknown", "twice", "mixed", "missing"])  # fmt: skip
def test_teachers_that_are_refused(flags, needles, tmp_path):
    _, data = mixed(tmp_path)
    refused(attempt(NAME, tmp_path, "--dataset", data, *flags), tmp_path, *needles)


def test_every_teacher_has_the_students_tokens(tmp_path):
    _, data = mixed(tmp_path)
    folder = teacher_folder(tmp_path / "other", tokenizer=swap_two)
    result = attempt(NAME, tmp_path, "--dataset", data, "--teacher", "adds=tiny", f"7={folder}")
    refused(result, tmp_path, f"--teacher {folder}", "2 of 103 tokens have another id")


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
