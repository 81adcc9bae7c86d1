"""PRM against the cross-entropy of two classes, by hand and by torch in float64; its token ids, labels, losses and
gradients against TRL 1.9.0, the last release that has it (fixtures/trl_prm.json, by benchmarks/trl_fixtures.py); its
logits against the classifier that transformers makes of the same weights; its final/ against a stranger who renders
text and asks for logits, and as a reward of grpo.

1e-5 on logits of size 1 to 10: rounding of fp32 sums in another order; a neighbouring token's differ by more than 1e-2.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, lone_run, read_jsonl, script, tiny_rows, train
from test_bad_input import attempt, refused, write_rows
from test_logprobs import build, make_groups
from test_losses import close, f64
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast

from common.batches import flat_batch
from common.data import Row
from common.runtime.flags import InputError
from common.step_rewards import StepRewardModel, StepScorer, encode_steps, separator_ids
from common.tokenization import load_tokenizer, stop_ids

prm, sft = script("experimental/prm"), script("sft")
FIXTURE = json.loads((ROOT / "tests" / "fixtures" / "trl_prm.json").read_text())
TINY = ROOT / "common" / "tiny" / "model"
LOGITS = {"rtol": 0, "atol": 1e-5}
NEIGHBOUR = 1e-2


# ---- loss ------------------------------------------------------------------------------------------------------------


def ours(pairs, labels):
    """Return loss, metrics and d loss / d both logits of every step, by the script's function in float64."""
    logits = f64(*pairs, grad=True)  # (M, 2): of wrong and right
    loss, metrics = prm.prm_loss(logits[:, 1] - logits[:, 0], f64(*labels))
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), metrics, gradient


PAIRS, LABELS = [(0.5, 2.0), (1.0, -1.0), (-3.0, 0.25), (7.0, 7.0)], [1.0, 1.0, 0.0, 0.0]


def test_the_loss_by_hand():
    loss, metrics, gradient = ours(PAIRS, LABELS)
    # z_1 - z_0 is 1.5, -2, 3.25 and 0: for the labels' side 1.5, -2, -3.25, 0
    close(loss, 0.2014132779827524 + 2.1269280110429727 + 3.288041371687783 + 0.6931471805599453)
    close(loss, sum(math.log(1 + math.exp(-x)) for x in (1.5, -2.0, -3.25, 0.0)))
    close(metrics["loss"], loss)
    assert metrics["accuracy"].item() == 1 and metrics["right_frac"].item() == 2
    slopes = [1 / (1 + math.exp(-d)) - label for d, label in zip((1.5, -2.0, 3.25, 0.0), LABELS)]  # p(1) - label
    close(gradient, [(-slope, slope) for slope in slopes])


def test_it_is_the_cross_entropy_of_two_classes():
    torch.manual_seed(0)
    logits = (3 * torch.randn(50, 2, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(2, (50,))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss, metrics, gradient = ours(logits.tolist(), labels.tolist())
    close(loss, expected)
    close(gradient, torch.autograd.grad(expected, logits)[0])
    assert metrics["accuracy"].item() == (logits.argmax(1) == labels).sum().item()
    parents = sft.sft_loss({"logprobs": logits[:, 1] - logits[:, 0]}, sft.Args())
    with pytest.raises(AssertionError):
        close(parents, expected)  # the log-prob of a next token is another thing


@pytest.mark.parametrize("far", (50.0, -50.0, 1000.0, -1000.0))
def test_far_apart_stays_finite(far):
    loss, _, gradient = ours([(0.0, far)], [1.0])
    close(loss, max(0.0, -far))
    close(gradient, [(1.0, -1.0)] if far < 0 else [(0.0, 0.0)], rtol=0, atol=1e-15)


# ---- TRL -------------------------------------------------------------------------------------------------------------


def groups_of(rows, tmp_path, separator="\n", last_step_only=False, tokenizer=None):
    tokenizer = tokenizer or load_tokenizer(str(TINY))
    args = prm.Args(dataset=str(write_rows(tmp_path, *rows)), step_separator=separator)
    stops = stop_ids(tokenizer)
    return prm.load_groups(args.dataset, tokenizer, stops, args, lone_run(args), last_step_only)[0]


@pytest.mark.parametrize("name", [name for name in FIXTURE["batches"] if name != "data"])
def test_trl_ids_and_labels(name, tmp_path):
    batch = FIXTURE["batches"][name]
    last_only = batch["last_only"] and not batch["is_eval"]
    groups = groups_of(FIXTURE["batches"]["data"], tmp_path, batch["separator"], last_only)
    for group, theirs in zip(groups, batch["rows"], strict=True):
        (completion,) = group["completions"]
        assert [*group["prompt"], *completion["ids"]] == theirs["input_ids"]
        labels = iter(completion["is_right"].tolist())
        ours = [next(labels) if scored else -100 for scored in completion["scored"]]
        assert [-100] * len(group["prompt"]) + ours == theirs["labels"]
        assert next(labels, None) is None


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: case["batch"])
def test_trl_losses_and_gradients(case):
    rows = FIXTURE["batches"][case["batch"]]["rows"]
    labels = [float(label) for row in rows for label in row["labels"] if label >= 0]
    loss, _, gradient = ours(case["logits"], labels)
    # transformers computes it in fp32
    close(loss / len(labels), case["loss"], rtol=1e-6, atol=1e-7)
    close(gradient / len(labels), case["gradient"], rtol=1e-5, atol=1e-7)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def merging_tokenizer():
    """Joins a and a new line where they stand together, knows a new line and no blank."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<end>", "a", "b", "\n", "a\n", "c", "d", "cd"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "\n"), ("c", "d")], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")


def test_no_token_belongs_to_a_step_and_a_separator():
    tokenizer = merging_tokenizer()
    assert tokenizer("ba\n", add_special_tokens=False)["input_ids"] == [3, 5]
    row = Row(prompt="b", completions=["ba", "a\na", ""])
    group = encode_steps(row, tokenizer, (), separator_ids(tokenizer, "\n"))
    assert list(group["prompt"]) == [3]
    (completion,) = group["completions"]
    assert list(completion["ids"]) == [3, 2, 4, 5, 2, 4, 4]  # within a step they join
    assert completion["scored"] == [False, False, True, False, False, True, True]


def test_a_separator_of_several_tokens_is_scored_at_its_last():
    tokenizer = merging_tokenizer()
    group = encode_steps(Row(prompt="b", completions=["c", "b"]), tokenizer, (), separator_ids(tokenizer, "d\n"))
    (completion,) = group["completions"]
    assert list(completion["ids"]) == [6, 7, 4, 3, 7, 4]  # c and d would join
    assert completion["scored"] == [False, False, True, False, False, True]


@pytest.mark.parametrize("separator", ("", " ", "\n "))
def test_separators_that_are_no_token(separator):
    with pytest.raises(InputError, match="--step_separator"):
        separator_ids(merging_tokenizer(), separator)


# ---- logits ----------------------------------------------------------------------------------------------------------


def classifier(name):
    """The random model of `build` as a token classifier with two labels, its head as wide as its other weights."""
    config = build(name, num_labels=2).config
    torch.manual_seed(1)
    lm = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in lm.parameters():
            p.normal_(std=1.5 * p.shape[-1] ** -0.5)
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return lm.eval()


@pytest.mark.parametrize("name", ("Llama", "Qwen3", "Gemma2", "GPT2", "Bloom"))
def test_logits_and_gradients_are_the_classifiers_own(name):
    """One sequence at a time, and on the flat (Bloom: padded) road with shared prompts, at some tokens of each."""
    groups = make_groups()
    scored_ids = []  # of every sequence, its ids and which of them are scored
    for group in groups:
        for completion in group["completions"]:
            flags = [place % 3 != 1 for place in range(len(completion["ids"]))]
            if not group["prompt"]:
                flags[0] = False
            completion["scored"] = flags
            ids = [*group["prompt"], *completion["ids"]]
            scored_ids.append((ids, [False] * len(group["prompt"]) + flags))
    lm = classifier(name)
    alone, before = [], []
    for ids, flags in scored_ids:
        logits = lm(torch.tensor([ids]), use_cache=False).logits[0]
        differences = logits[:, 1] - logits[:, 0]
        alone.append(differences[torch.tensor(flags)])
        before.append(differences[:-1][torch.tensor(flags[1:])])
    alone, before = torch.cat(alone), torch.cat(before)
    weights = torch.linspace(-1, 1.3, len(alone))
    (alone * weights).sum().backward()
    grads = {key: p.grad.clone() for key, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    scorer = StepScorer(lm)
    logits = scorer(flat_batch(groups))["step_logits"]
    torch.testing.assert_close(logits, alone, **LOGITS)
    torch.testing.assert_close(scorer.plain_forward(groups), alone, **LOGITS)
    (logits * weights).sum().backward()
    for key, gradient in grads.items():
        worst = (dict(lm.named_parameters())[key].grad - gradient).abs().max() / gradient.abs().max()
        assert worst < 5e-5, (key, worst)  # sums in another order, as in test_mesh
    assert (before - alone).abs().max() > NEIGHBOUR  # what predicts the token says something else


def test_a_model_without_such_a_head_is_refused():
    with pytest.raises(InputError, match="no linear head"):
        StepScorer(build("Llama"))


# ---- runs ------------------------------------------------------------------------------------------------------------

HELDOUT = 5
FLAGS = ["--max_steps", 3, "--batch_size", 4, "--eval_every", 0, "--save_every", 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps, and its held-out rows."""
    folder = tmp_path_factory.mktemp("prm")
    rows = (ROOT / "common" / "tiny" / "test.jsonl").read_text().splitlines(keepends=True)[:HELDOUT]
    (folder / "heldout.jsonl").write_text("".join(rows))
    data = tiny_rows("experimental/prm", folder / "rows.jsonl", 12)
    train("experimental/prm", folder / "out", "--dataset", data, "--eval_dataset", folder / "heldout.jsonl", *FLAGS)
    return SimpleNamespace(folder=folder, final=folder / "out" / "final", data=data, rows=[json.loads(x) for x in rows])


@torch.no_grad()
def stranger(final, question, steps):
    """p(right) of each step from a folder, with nothing of this project. Every character is a token."""
    lm, tokenizer = AutoModelForTokenClassification.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    places = []
    for step in steps:
        text += step + lm.config.step_separator
        places.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 1)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return lm(ids).logits[0].softmax(-1)[places, 1]


def test_final_says_what_training_says(trained):
    config = json.loads((trained.final / "config.json").read_text())
    assert config["architectures"] == ["LlamaForTokenClassification"] and config["step_separator"] == " "
    right = loss = steps = labels = 0
    for row in trained.rows:
        answers = stranger(trained.final, row["prompt"][0]["content"], row["completions"])
        label = torch.tensor(row["labels"])
        loss -= torch.where(label, answers, 1 - answers).log().sum().item()
        right += ((answers > 0.5) == label).sum().item()
        labels += label.sum().item()
        steps += len(label)
    last = read_jsonl(trained.folder / "out" / "metrics.jsonl")[-1]
    assert last["eval/loss"] == pytest.approx(loss / steps, abs=1e-5)
    assert (last["eval/accuracy"], last["eval/right_frac"]) == (right / steps, labels / steps)
    assert 0 < right < steps


def test_it_goes_on_as_it_was(trained, tmp_path):
    flags = ["--model", trained.final, "--dataset", trained.data, "--eval_dataset", trained.folder / "heldout.jsonl"]
    train("experimental/prm", tmp_path / "out", *flags, *FLAGS)
    first, *_ = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    *_, last = read_jsonl(trained.folder / "out" / "metrics.jsonl")
    for key in first.keys() - {"step"}:
        assert first[key] == pytest.approx(last[key], abs=1e-5), key


def test_only_the_last_step_of_a_training_row(trained, tmp_path):
    flags = ["--dataset", trained.data, "--eval_dataset", trained.folder / "heldout.jsonl", "--train_on_last_step_only"]
    train("experimental/prm", tmp_path / "out", *flags, *FLAGS)
    lines = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    whole = read_jsonl(trained.folder / "out" / "metrics.jsonl")
    assert [line["num_tokens"] for line in lines[1:4]] == [4] * 3
    assert [line["num_tokens"] for line in whole[1:4]] == [20] * 3
    assert lines[0] == whole[0]  # evaluation has all of them


def test_the_separator_may_be_typed(tmp_path):
    """The two characters that a shell makes of "\\n" are a new line."""
    typed, meant = (groups_of(FIXTURE["batches"]["data"], tmp_path, separator) for separator in ("\\n", "\n"))
    assert [group["completions"][0]["ids"] for group in typed] == [group["completions"][0]["ids"] for group in meant]


# ---- a reward of grpo ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", (False, True))
def test_as_a_reward(mean, trained, tmp_path):
    """What samples.jsonl has is what a stranger gets from the folder for the steps of the same texts."""
    flags = ["--dataset", tiny_rows("grpo", tmp_path / "rows.jsonl", 6), "--max_steps", 1, "--batch_size", 2]
    name = f"{trained.final}{':mean' if mean else ''}"
    train("grpo", tmp_path / "out", *flags, "--reward", name, "--eval_dataset", "", "--save_every", 0)
    samples = read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert len(samples) >= 8
    found = []
    for row in samples:
        question = row["prompt"].removeprefix("<|user|>").partition("<|end|>")[0]
        steps = [step for step in row["completion"].removesuffix("<|end|>").split(" ") if step]
        answers = stranger(trained.final, question, steps)
        expected = answers.mean() if mean else answers.min()
        assert row["parts"][0] == pytest.approx(expected.item(), abs=1e-5)
        found.append((answers.min() - answers.mean()).abs().item())
    assert max(found) > NEIGHBOUR


def test_steps_of_a_completion(trained):
    model = StepRewardModel(str(trained.final), 4096)
    assert model.steps_of("7+5=12 4+8=12  #### 212 ") == ["7+5=12", "4+8=12", "####", "212"]
    assert model.steps_of("") == model.steps_of("  ") == [""]
    model.separator = "\n"
    assert model.steps_of("one two\n\n three\n \n") == ["one two", " three"]
    prompts = [[{"role": "user", "content": "What is 1 + 2?"}]] * 3
    completions = [[{"role": "assistant", "content": text}] for text in ("", "1+2=3", "1+2=3 #### 3")]
    model.separator = " "
    together = model(prompts, completions)
    alone = [model(prompts[:1], [completion])[0] for completion in completions]
    assert together == pytest.approx(alone, abs=1e-6) and len(set(together)) == 3
    assert together[2] == pytest.approx(stranger(trained.final, "What is 1 + 2?", ["1+2=3", "####", "3"]).min().item(),
                                        abs=1e-6)  # fmt: skip


def edited(final, folder, **changes):
    """A copy of a folder with other values in its config.json; None: without."""
    folder.mkdir()
    for path in final.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_folders_that_are_no_step_models(trained, tmp_path):
    three = tmp_path / "three"
    config = transformers.AutoConfig.from_pretrained(trained.final, num_labels=3)
    AutoModelForTokenClassification.from_config(config).save_pretrained(three)
    AutoTokenizer.from_pretrained(trained.final).save_pretrained(three)
    cases = {
        three: "two labels",
        edited(trained.final, tmp_path / "mute", step_separator=None): "step_separator",
        edited(trained.final, tmp_path / "odd", step_separator="\u00e9"): "--step_separator",
        edited(trained.final, tmp_path / "deep", num_hidden_layers=10**9): "num_hidden_layers",  # never built
        f"{TINY}:mean": "reward model",
    }
    for number, (folder, needle) in enumerate(cases.items()):
        where = tmp_path / f"x{number}"
        refused(attempt("grpo", where, "--reward", folder), where, f"--reward {folder}", needle)


# ---- bad input -------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "3+4?", "completions": ["3+4=7", "#### 7"], "labels": [True, False]}


@pytest.mark.parametrize("change, needle", (
    ({"labels": [True]}, "1 labels for 2 steps"),
    ({"labels": [True, False, True]}, "3 labels for 2 steps"),
    ({"labels": None}, "column labels"),
    ({"labels": [True, None]}, "column labels"),
    ({"labels": [True, 0.5]}, "column labels"),
    ({"labels": ["+", "-"]}, "column labels"),
    ({"labels": True}, "column labels"),
    ({"completions": []}, "column completions"),
    ({"completions": "3+4=7"}, "column completions"),
    ({"completions": None}, "column completions"),
    ({"completions": ["3+4=7", 7]}, "a step"),
    ({"completions": ["3+4=7", "\ud800"]}, "a step"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
))  # fmt: skip
def test_rows_that_are_no_steps(change, needle, tmp_path):
    data = write_rows(tmp_path, GOOD, GOOD | change)
    refused(attempt("experimental/prm", tmp_path, "--dataset", data), tmp_path, "mine.jsonl:2", needle)


def test_rows_without_labels(tmp_path):
    data = write_rows(tmp_path, {"prompt": "3+4?", "completions": ["7"]})
    refused(attempt("experimental/prm", tmp_path, "--dataset", data), tmp_path, "labels")


@pytest.mark.parametrize("separator", ("", "\u00e9"))
def test_a_separator_that_is_no_token(separator, tmp_path):
    result = attempt("experimental/prm", tmp_path, "--step_separator", separator)
    refused(result, tmp_path, "--step_separator")


def test_a_step_that_spells_a_control_token_is_said(tmp_path):
    data = write_rows(tmp_path, *[GOOD | {"completions": ["3+4=7<|end|>", "#### 7"]}] * 4)
    result = attempt("experimental/prm", tmp_path, "--dataset", data)
    assert result.code == 0 and "DATA011" in result.err
