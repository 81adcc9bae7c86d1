"""sdpo.py: its loss in float64 and against TRL 1.16.0 (fixtures/trl_distillation.json); who learns from whom; a step by
transformers; its two ends, which are grpo.py and sdft.py; steps that nothing can be learned from."""

import json
import math
from array import array
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, newest, read_jsonl, script, tiny_rows, train, trainer_tensors
from test_bad_input import attempt, refused, write_rows
from test_distillation import CLOSE, FIXTURE, differentiable, inputs, logits, trl_inputs
from test_losses import f64
from test_sdft import ours
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.batches import flat_batch
from common.data import Row

NAME, TINY = "experimental/sdpo", ROOT / "common" / "tiny"
sdpo = script(NAME)
NAN = math.nan


def settings(**flags):
    return SimpleNamespace(**{"distillation_mode": "sampled_token", "distillation_weight": 1.0} | flags)


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FIXTURE["sdpo"], ids=lambda c: f"{c['mode']}-{c['weight']}-{sum(c['taught'])}")
def test_trl(case):
    """SDPOTrainer's loss of two completions, of four and two tokens, with its gradients."""
    student, teacher = trl_inputs()
    top_k = case["top_k"] if case["mode"] == "topk_logits" else 0
    out = ours(student, teacher, torch.tensor(case["labels"]), case["alpha"], top_k)
    batch = {"seq": torch.tensor(case["seq"])}
    for name, values in {"taught": case["taught"], "advantage": case["advantages"]}.items():
        batch[name] = torch.tensor(values, dtype=torch.float32)
    args = settings(distillation_mode=case["mode"], distillation_weight=case["weight"])
    loss = sdpo.sdpo_loss(out, batch, num_tokens=6, num_completions=2, args=args)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-7)
    hidden, weight, bias = torch.autograd.grad(loss, student)
    d_z = torch.tensor(case["d_logits"])
    torch.testing.assert_close(hidden, d_z @ student[1].detach(), **CLOSE)
    torch.testing.assert_close(weight, d_z.T @ student[0].detach(), **CLOSE)
    torch.testing.assert_close(bias, d_z.sum(0), **CLOSE)


SEQ, TAUGHT, ADVANTAGES = [0] * 5 + [1] + [2] * 7 + [3] * 4, [1, 0, 1, 1], [0.9, -1.2, 0.0, 0.3]
NUM_TOKENS, NUM_COMPLETIONS = 40, 9  # of the step: this micro-batch has 17 and 4


def by_definition(z, teacher_z, labels, mode, weight):
    """z (17, V) float64, with gradient. A token at a time."""
    total = 0.0
    for t, (seq, label) in enumerate(zip(SEQ, labels.tolist())):
        p, q = z[t].softmax(-1), teacher_z[t].softmax(-1)
        if mode == "topk_logits":
            kept = z[t].detach().topk(4).indices
            p, q = p[kept] / p[kept].sum(), q[kept] / q[kept].sum()
        if mode == "sampled_token":
            term = (p[label] / q[label]).log().detach() * p[label].log()
        else:
            term = (p * (p / q).log()).sum()
        distilled = TAUGHT[seq] * term / SEQ.count(seq) / NUM_COMPLETIONS
        reinforced = -ADVANTAGES[seq] * z[t].softmax(-1)[label] / z[t].softmax(-1)[label].detach() / NUM_TOKENS
        total = total + weight * distilled + (1 - weight) * reinforced
    return total


@pytest.mark.parametrize("weight", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("mode", ("topk_logits", "full_logits", "sampled_token"))
def test_in_float64(mode, weight):
    """A micro-batch's part, by the definition. Its parent's loss, under which all are taught, is another number."""
    student, teacher, labels = inputs()
    student = [x.requires_grad_() for x in student]
    out = ours(student, teacher, labels, 1.0, 4 if mode == "topk_logits" else 0)
    batch = {"seq": torch.tensor(SEQ), "taught": torch.tensor(TAUGHT).float(), "advantage": torch.tensor(ADVANTAGES)}
    args = settings(distillation_mode=mode, distillation_weight=weight)
    loss = sdpo.sdpo_loss(out, batch, NUM_TOKENS, NUM_COMPLETIONS, args)
    exact = [x.detach().double().requires_grad_() for x in student]
    wanted = by_definition(logits(exact), logits(teacher), labels, mode, weight)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    got = torch.autograd.grad(loss, student, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(wanted, exact)):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # fp32 against float64
    parents = script("experimental/sdft").sdft_loss(out, batch, args) / NUM_COMPLETIONS
    assert abs(parents.item() / wanted.item() - 1) > 0.01


def test_advantages():
    """By hand; a completion without a reward is in no statistic, and a prompt of equal rewards says nothing."""
    rewards = f64([1, 0, 0, 1], [0.5] * 4, [NAN, 3, NAN, 1], [NAN] * 4, [NAN, NAN, 2, NAN])
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    wanted = f64([a, -a, -a, a], [0] * 4, [0, b, 0, -b], [0] * 4, [0] * 4)
    torch.testing.assert_close(sdpo.compute_advantages(rewards), wanted, rtol=1e-12, atol=0)


# ---- who learns from whom --------------------------------------------------------------------------------------------

TEMPLATE = "{prompt}\\nSolution: {solution}\\nFeedback: {privileged_context}\\nSolve it."


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


def judged(tokenizer, rewards, **columns):
    """A group whose completions are called "0", "1", ..., each with an end of turn."""
    completions = []
    for k, reward in enumerate(rewards):
        ids = array("i", [*tokenizer(str(k))["input_ids"], tokenizer.eos_token_id])
        completions.append({"ids": ids, "scored": None, "reward": float(reward), "advantage": 0.0, "k": k})
    return {"prompt": array("i", [9, 9]), "teacher_prompt": array("i", [8]), "row": 0, "columns": Row(columns),
            "completions": completions}  # fmt: skip


def teachers(groups, tokenizer, **flags):
    """-> {k: (text of what its teacher reads, taught)}"""
    args = sdpo.Args(**{"teacher_prompt_template": TEMPLATE, "success_reward_threshold": 0.5} | flags)
    found = {}
    for group in sdpo.add_teachers(groups, tokenizer, args):
        for completion in group["completions"]:
            found[completion["k"]] = tokenizer.decode(group["teacher_prompt"]), completion["taught"]
    return found


@pytest.mark.parametrize("case", FIXTURE["solutions"], ids=str)
def test_the_solutions_are_trls(case, tokenizer):
    """First other solution, and feedback; where TRL's teacher knows nothing, none teaches."""
    columns = {"prompt": case["prompt"], "privileged_context": case["privileged_context"]}
    found = teachers([judged(tokenizer, case["rewards"], **columns)], tokenizer)
    for k, (teacher, taught) in enumerate(zip(case["teacher"], case["taught"], strict=True)):
        if isinstance(teacher, list):
            teacher = tokenizer.apply_chat_template(teacher, add_generation_prompt=True, tokenize=False)
        assert found[k][1] == taught
        if taught and ("Solution" in teacher):
            assert found[k][0] == teacher


@pytest.mark.parametrize("rewards, wanted", (
    ([0, 0, 0], [None, None, None]), ([0, 1, 0], [1, None, 1]), ([1, 0, 1], [2, 0, 0]), ([1, 1, 1], [1, 0, 0]),
    ([0, 0.4, 0.5], [2, 2, None]), ([NAN, 1, NAN], [1, None, 1]), ([1], [None]), ([-9, 0, math.inf], [2, 2, None]),
))  # fmt: skip
def test_the_first_other_solution(rewards, wanted, tokenizer):
    """By hand: nobody learns from itself, and what nobody judged is no solution."""
    found = teachers([judged(tokenizer, rewards, prompt="Q")], tokenizer)
    for k, solution in enumerate(wanted):
        text = tokenizer.decode([8]) if solution is None else f"Q\nSolution: {solution}\nSolve it."
        assert found[k] == (text, float(solution is not None))


def test_feedback_teaches_without_a_solution(tokenizer):
    """By the prompt that was encoded when the rows were read."""
    group = judged(tokenizer, [0, 0], prompt="Q", privileged_context="Mind it.")
    assert teachers([group], tokenizer) == {0: (tokenizer.decode([8]), 1.0), 1: (tokenizer.decode([8]), 1.0)}


def test_a_solution_that_leaves_no_room_is_not_shown(tokenizer):
    """The next one that does is. A prompt of 18 characters with one of one; "Q" and the end of the turn are no more."""
    group = judged(tokenizer, [1, 1, 0, 1], prompt="Q")
    group["completions"][0]["ids"] = array("i", tokenizer("0" * 9)["input_ids"])
    flags = {"teacher_prompt_template": "{prompt}{solution}\\n{privileged_context}", "max_completion_length": 4}
    for max_length, wanted in ((14, [1, 0, 0, 0]), (13, [1, 3, 1, 1]), (6, [1, 3, 1, 1]), (5, [None] * 4)):
        found = teachers([group], tokenizer, max_length=max_length, **flags)
        texts = ["0" * 9, "1", "2", "3"]
        for k, solution in enumerate(wanted):
            text = tokenizer.decode([8]) if solution is None else f"Q{texts[solution]}"
            assert found[k] == (text, float(solution is not None)), (max_length, k)


def test_both_batches_score_the_same_tokens(tokenizer):
    """However completions are regrouped, the teacher's row m predicts what the student's does, and nobody is lost."""
    groups = [judged(tokenizer, rewards, prompt="Q") for rewards in ([0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0])]
    pieces = sdpo.add_teachers(groups, tokenizer, sdpo.Args(success_reward_threshold=0.5))
    assert [len(piece["completions"]) for piece in pieces] == [3, 1, 4, 1, 3]
    student, teacher = flat_batch(pieces), flat_batch(sdpo.teacher_groups(pieces))
    assert torch.equal(student["labels"], teacher["labels"]) and torch.equal(student["seq"], teacher["seq"])
    assert student["taught"].tolist() == [1.0] * 4 + [0.0] * 4 + [0.0] + [1.0] * 3
    assert len(student["taught"]) == 12 and len(teacher["input_ids"]) > len(student["input_ids"])


def test_braces_in_texts_are_letters():
    row = Row(prompt="3+4? {solution}", privileged_context="{prompt}")
    made = sdpo.with_context(row, TEMPLATE, "{privileged_context}")
    assert made["prompt"] == "3+4? {solution}\nSolution: {privileged_context}\nFeedback: {prompt}\nSolve it."
    assert row["prompt"] == "3+4? {solution}"


# ---- a step ----------------------------------------------------------------------------------------------------------

PATTERN = """
def by_pattern(prompts, completions, pattern, **_):
    # the k-th completion of a prompt gets the k-th digit of its row's pattern, which no other row has
    seen, rewards = {}, []
    for digits in pattern:
        k = seen.get(digits, 0)
        seen[digits] = k + 1
        rewards.append(None if digits[k] == "x" else float(digits[k]))
    return rewards
"""
FEEDBACK = {"privileged_context": "Mind it."}
# The second has a completion that nobody teaches, of the third there is no other, and the last has feedback.
ROWS = [{"pattern": "0110"}, {"pattern": "0100"}, {"pattern": "0000"}, {"pattern": "00x1"} | FEEDBACK]


def patterned(folder, rows=ROWS):
    """Rows whose rewards are known -> flags."""
    (folder / "pattern.py").write_text(PATTERN)
    written = []
    for k, row in enumerate(rows):
        written.append({"prompt": [{"role": "user", "content": f"What is 12{k} + 345?"}]} | row)
    flags = ["--dataset", write_rows(folder, *written), "--reward", f"{folder}/pattern.py:by_pattern"]
    flags += ["--batch_size", 4, "--eval_every", 0, "--save_every", 0, "--eval_dataset", "", "--max_length", 400]
    return [*flags, "--temperature", 1, "--success_reward_threshold", 1, "--allow", "GRPO003"]


def expected_step(samples, mode, weight):
    """The loss and the norm of its gradient, by transformers in float64, a completion at a time."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    student, teacher = (AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float64) for _ in range(2))
    distilled = reinforced = 0.0
    num_tokens = 0
    for first in range(0, len(samples), 4):
        group = samples[first : first + 4]
        row = ROWS[group[0]["row"]]
        question = f"What is 12{group[0]['row']} + 345?"
        rewards = [sample["reward"] for sample in group]
        known = [reward for reward in rewards if reward is not None]
        mean = sum(known) / len(known)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in known) / (len(known) - 1))
        for k, sample in enumerate(group):
            answer = tokenizer(sample["completion"], add_special_tokens=False)["input_ids"]
            shown = [other["completion"] for j, other in enumerate(group) if j != k and rewards[j] == 1.0]
            lines = [question, ""]
            lines += [f"A solution: {shown[0].removesuffix('<|end|>')}"] if shown else []
            lines += [f"Feedback: {row['privileged_context']}"] if "privileged_context" in row else []
            lines += ["", "Now solve it in your own words."]
            logp = []
            for lm, content in ((student, question), (teacher, "\n".join(lines))):
                messages = [{"role": "user", "content": content}]
                prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                logp.append(lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
            own, others = logp[0][range(len(answer)), answer], logp[1].detach()[range(len(answer)), answer]
            if len(lines) > 4:
                terms = (own.detach() - others) * own
                if mode == "full_logits":
                    terms = differentiable(logp[0].exp(), logp[1].detach().exp(), 1.0)
                distilled = distilled + terms.mean()
            advantage = 0.0 if rewards[k] is None else (rewards[k] - mean) / (std + 1e-4)
            assert sample["advantage"] == pytest.approx(advantage, rel=1e-9)
            reinforced = reinforced - (advantage * (own - own.detach()).exp()).sum()
            num_tokens += len(answer)
    loss = weight * distilled / len(samples) + (1 - weight) * reinforced / num_tokens
    loss.backward()
    return loss.item(), math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))


@pytest.mark.parametrize("world, mode, weight", [
    (1, "sampled_token", 1.0), (2, "sampled_token", 0.3), (1, "full_logits", 0.3), (2, "full_logits", 1.0),
])  # fmt: skip
def test_a_step_by_transformers(world, mode, weight, tmp_path):
    """Of four prompts, with the template that the script has, in small pieces and over ranks. With the other weight it
    would be another number."""
    template = sdpo.Args().teacher_prompt_template
    flags = [*patterned(tmp_path), "--max_steps", 1, "--teacher_prompt_template", template]
    flags += ["--distillation_mode", mode, "--distillation_weight", weight, "--tokens_per_microbatch", 100]
    train(NAME, tmp_path / "run", *flags, world=world)
    (line,) = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 16
    loss, norm = expected_step(samples, mode, weight)
    # a sampled token's log-prob, known to some 1e-7 in fp32, times a log-ratio of 10
    assert line["loss"] == pytest.approx(loss, rel=2e-5, abs=1e-6 if mode == "sampled_token" else 0)
    assert line["grad_norm"] == pytest.approx(norm, rel=2e-5)
    assert abs(expected_step(samples, mode, 0.5)[1] / norm - 1) > 0.01
    assert line["success_frac"] == 4 / 16 and line["reprompted_frac"] == 11 / 16
    assert line["no_reward_frac"] == 1 / 16 and line["silent_frac"] == 1 / 4
    lengths = [len(sample["completion"].replace("<|end|>", "E")) for sample in samples]  # a token a character
    untaught = [5, *range(8, 12)]
    learned = sum(length for k, length in enumerate(lengths) if weight < 1 or k not in untaught)
    assert line["num_tokens"] == learned


def steps(folder):
    return [line for line in read_jsonl(folder / "metrics.jsonl") if "grad_norm" in line]


def test_without_distillation_it_is_grpo(tmp_path):
    """The same samples, and step by step the same numbers, from a script that shares only common/ with it."""
    flags = ["--dataset", tiny_rows(NAME, tmp_path / "rows.jsonl", 12), "--max_steps", 4, "--batch_size", 3]
    flags += ["--eval_every", 0, "--save_every", 0, "--eval_dataset", "", "--temperature", 1, "--learning_rate", 5e-4]
    flags += ["--num_generations", 4, "--max_completion_length", 40]
    train(NAME, tmp_path / "sdpo", *flags, "--distillation_weight", 0)
    train("grpo", tmp_path / "grpo", *flags, "--steps_per_generation", 1, "--num_iterations", 1, "--beta", 0)
    texts = [[row["completion"] for row in read_jsonl(tmp_path / name / "samples.jsonl")] for name in ("sdpo", "grpo")]
    assert texts[0] == texts[1] and len(texts[0]) == 48
    for one, other in zip(steps(tmp_path / "sdpo"), steps(tmp_path / "grpo"), strict=True):
        assert one["reward"] == other["reward"] and one["num_tokens"] == other["num_tokens"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-7)


def test_without_solutions_it_is_sdft(tmp_path):
    """With feedback alone, which sdft.py calls a privileged context; the line of the solution is left out."""
    flags = ["--dataset", tiny_rows("experimental/sdft", tmp_path / "rows.jsonl", 12), "--max_steps", 4]
    flags += ["--batch_size", 3, "--eval_every", 0, "--save_every", 0, "--eval_dataset", "", "--temperature", 1]
    flags += ["--num_generations", 4, "--distillation_mode", "sampled_token", "--beta", 1, "--learning_rate", 5e-4]
    flags += ["--teacher_model_kind", "ema", "--teacher_sync_steps", 1, "--teacher_update_rate", 0.5]
    alone = ["--success_reward_threshold", 2, "--distillation_weight", 1]
    train(NAME, tmp_path / "sdpo", *flags, "--teacher_prompt_template", "{solution}\\n{privileged_context}", *alone)
    train("experimental/sdft", tmp_path / "sdft", *flags, "--teacher_prompt_template", "{privileged_context}")
    for one, other in zip(steps(tmp_path / "sdpo"), steps(tmp_path / "sdft"), strict=True):
        assert one["reprompted_frac"] == 1 and one["success_frac"] == 0
        for key in ("loss", "grad_norm", "entropy"):
            assert one[key] == pytest.approx(other[key], rel=1e-5), key


# ---- steps without a teacher -----------------------------------------------------------------------------------------


def weights(folder):
    return {key: tensor for key, tensor in trainer_tensors(folder).items() if key.startswith("model.policy.")}


@pytest.mark.parametrize("pattern, weight", [("0000", 1), ("0005", 1), ("xxxx", 1), ("xxxx", 0.5)])
def test_a_step_that_nobody_teaches_is_skipped(pattern, weight, tmp_path):
    """The first step has solutions, so Adam has moments. In the second nothing reaches the threshold, or nothing has a
    reward: neither weights nor moments move, and the numbers are numbers."""
    rows = [{"pattern": "9990"}, {"pattern": pattern}]
    flags = [*patterned(tmp_path, rows), "--batch_size", 1, "--max_steps", 2, "--save_every", 1, "--seed", 1]
    flags += ["--success_reward_threshold", 6, "--distillation_weight", weight, "--weight_decay", 0.1]
    train(NAME, tmp_path / "run", *flags)
    lines = steps(tmp_path / "run")
    assert [line["success_frac"] for line in lines] == [0.75, 0], "another --seed: the solutions have to come first"
    assert (lines[1]["loss"], lines[1]["grad_norm"], lines[1]["reprompted_frac"]) == (0, 0, 0)
    assert lines[1]["entropy"] > 0 and lines[1]["num_tokens"] > 0 and lines[0]["grad_norm"] > 0
    first, second = (trainer_tensors(tmp_path / "run" / f"checkpoint-{step:06d}") for step in (1, 2))
    still = [key for key in first if not key.startswith("model.teacher.")]
    assert len(still) > 60 and all(torch.equal(first[key], second[key]) for key in still)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_with_a_policy_gradient_such_a_step_is_none_to_skip(tmp_path):
    """Rewards that differ below the threshold: nobody teaches, and grpo's gradient remains."""
    rows = [{"pattern": "0120"}, {"pattern": "2100"}]
    flags = [*patterned(tmp_path, rows), "--batch_size", 2, "--max_steps", 1, "--success_reward_threshold", 3]
    norms = {}
    for weight in (1.0, 0.5, 0.0):
        train(NAME, tmp_path / f"{weight}", *flags, "--distillation_weight", weight)
        (line,) = steps(tmp_path / f"{weight}")
        assert line["reprompted_frac"] == 0
        norms[weight] = line["grad_norm"]
    assert norms[1.0] == 0 and norms[0.0] > 0 and norms[0.5] == pytest.approx(norms[0.0] / 2, rel=1e-5)
    start = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).model.norm.weight
    for weight, moves in ((1.0, False), (0.5, True)):
        after = AutoModelForCausalLM.from_pretrained(newest(tmp_path / f"{weight}")).model.norm.weight
        assert torch.equal(start, after) is not moves


def test_sdpo001_nobody_ever_teaches(tmp_path):
    """Ten rollouts in a row: said once, and the run goes on to its end."""
    flags = ["--dataset", tiny_rows(NAME, tmp_path / "rows.jsonl", 8), "--max_steps", 11, "--batch_size", 1]
    flags += ["--success_reward_threshold", 2, "--distillation_weight", 1, "--eval_dataset", "", "--save_every", 0]
    train(NAME, tmp_path / "run", *flags)
    alerts = [(line["step"], line["code"], line["level"]) for line in read_jsonl(tmp_path / "run" / "alerts.jsonl")]
    assert alerts == [(10, "SDPO001", "error"), (11, "SDPO001", "error")]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_rewards_judge_the_held_out_rows(tmp_path):
    """And not the right sum, which the tiny model has in 30 of 100."""
    (tmp_path / "ones.py").write_text("def ones(prompts, completions, **_):\n    return [1.0] * len(completions)\n")
    flags = ["--dataset", tiny_rows(NAME, tmp_path / "rows.jsonl", 4), "--eval_dataset", "tiny:test[:20]"]
    flags += ["--max_steps", 1, "--batch_size", 1, "--save_every", 0, "--reward", f"{tmp_path}/ones.py:ones"]
    train(NAME, tmp_path / "run", *flags)
    assert [line["eval/accuracy"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")[::2]] == [1.0, 1.0]


# ---- learning --------------------------------------------------------------------------------------------------------


def test_the_student_learns_from_feedback(tmp_path):
    """By the preset, in which no completion counts as a solution: 8 steps take off half of the loss."""
    preset = json.loads((TINY / "presets.json").read_text())["sdpo"]
    flags = ["--dataset", "tiny:privileged[:64]", "--max_steps", 8, "--batch_size", 8, "--learning_rate", 2e-4]
    flags += ["--teacher_prompt_template", preset["teacher_prompt_template"], "--eval_every", 0, "--save_every", 0]
    flags += ["--success_reward_threshold", 2, "--distillation_weight", 1, "--distillation_mode", "full_logits"]
    train(NAME, tmp_path / "run", *flags, "--eval_dataset", "", "--temperature", 1)
    losses = [line["loss"] for line in steps(tmp_path / "run")]
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2]), losses


@pytest.mark.slow
def test_the_student_learns_what_it_solved(tmp_path):
    """From a model that sft.py has taught to read a solution, and that adds no better for it: by its own solutions
    alone the share of right sums rises by a fifth and more. A minute or two."""
    shown = sdpo.Args().teacher_prompt_template.replace("{prompt}", "{prompt.0.content}")
    shown = shown.replace("{solution}", "{completion.0.content}").replace("Feedback: {privileged_context}\\n", "")
    usual = ["--batch_size", 16, "--max_length", 256, "--eval_every", 0, "--save_every", 0]
    model = "tiny"
    for name, rate in (("half", 1e-3), ("reader", 5e-4)):  # in halves, as a run may take a minute here
        flags = ["--model", model, "--dataset", "tiny:demonstrations", "--rename", f"{shown}:prompt", "--max_steps", 60]
        train("sft", tmp_path / name, *usual, *flags, "--eval_dataset", "", "--batch_size", 32, "--learning_rate", rate)
        model = tmp_path / name / "final"
    flags = ["--model", model, "--dataset", "tiny:prompts", "--eval_dataset", "tiny:test"]
    flags += ["--max_steps", 10, "--learning_rate", 1e-4, "--num_generations", 8, "--max_completion_length", 48]
    flags += ["--temperature", 1, "--distillation_weight", 1, "--teacher_update_rate", 0.05, "--teacher_sync_steps", 1]
    train(NAME, tmp_path / "run", *usual, *flags)
    before, *_, after = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval/accuracy" in line]
    assert after["eval/accuracy"] > before["eval/accuracy"] + 0.2, (before, after)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, needles", [
    (["--distillation_weight", 1.5], ["--distillation_weight 1.5", "from 0 to 1"]),
    (["--distillation_weight", -1], ["--distillation_weight -1", "from 0"]),
    (["--beta", 0.5], ["sampled_token", "--beta 1", "0.5"]), (["--temperature", 0], ["--temperature"]),
    (["--distillation_mode", "topk_logits", "--loss_top_k", 104], ["--loss_top_k 104", "103"]),
    (["--teacher_prompt_template", "{prompt} {privileged_context}"], ["--teacher_prompt_template", "{solution}"]),
    (["--teacher_prompt_template", "{prompt} {solution}"], ["--teacher_prompt_template", "{privileged_context}"]),
    (["--teacher_prompt_template", "{question} {solution} {privileged_context}"], ["no other {name}"]),
    (["--reward", "none.py:f"], ["--reward none.py:f"]), (["--reward_weights", 1, 1], ["2 values for 1 rewards"]),
], ids=lambda x: "_".join(map(str, x)).strip("-") if len(x) > 1 else None)  # fmt: skip
def test_flags_that_are_refused(flags, needles, tmp_path):
    refused(attempt(NAME, tmp_path, *flags), tmp_path, *needles)


ASKS = {"role": "user", "content": "3+4?"}


@pytest.mark.parametrize("row, needles", [
    ({"question": "4+4=", "answer": "8"}, ["wanted columns prompt", "mine.jsonl:2"]),
    ({"prompt": "4+4=", "answer": "8", "privileged_context": 8}, ["privileged_context holds int", "mine.jsonl:2"]),
    ({"prompt": [ASKS, {"role": "tool", "content": "7"}], "answer": "8"}, ["a user's", "mine.jsonl:2"]),
], ids=["absent", "number", "not a user"])  # fmt: skip
def test_rows_that_no_teacher_can_read(row, needles, tmp_path):
    data = write_rows(tmp_path, {"prompt": "3+4=", "answer": "7"}, row)
    refused(attempt(NAME, tmp_path, "--dataset", data), tmp_path, *needles)
