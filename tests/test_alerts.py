"""Every alert code is provoked, says what design section 11 promises, and stays silent in the healthy recipe.

Inputs are real ones where a user can produce the trouble (rows, templates, models, rewards, flags); where only a bug in
a fork could, the forked child replaces one function of the script.
"""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, STABLE, script, tiny_flags, tiny_rows
from safetensors.torch import load_file, save_file
from test_bad_input import leave

from common import sampling
from common.runtime import checkpoint, parallel

MARKER = "obey-me-99"  # in every path, name, row and exception of this file; never in an alert
MODEL = ROOT / "common" / "tiny" / "model"
KEYS = ["step", "code", "level", "metric", "value", "limit", "message", "fix", "count"]
WRITES = {"role": "assistant", "content": f"{MARKER} #### 7"}
ASKS = {"role": "user", "content": f"{MARKER} What is 3 + 4?"}


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def provoke(name, folder, *flags, patch=None, rows=8, steps=1, allow=()):
    """A short run on the first rows of its tiny data; later flags win. -> code, err, args, alerts, folder."""
    here = folder / MARKER
    here.mkdir(exist_ok=True)
    out = here / f"out{len(list(here.iterdir()))}"
    data = tiny_rows(name, here / "rows.jsonl", rows)
    argv = [*tiny_flags(name), "--dataset", data, "--eval_dataset", "", "--batch_size", 2, "--max_steps", steps]
    argv += ["--output_dir", out, *flags, *(["--allow", *allow] if allow else [])]
    result = leave(name, *argv, patch=patch)
    result.args, result.folder = script(name).parse_args([str(flag) for flag in argv]), out
    text = (out / "alerts.jsonl").read_text() if (out / "alerts.jsonl").is_file() else ""
    assert MARKER not in text
    result.alerts = [strict(line) for line in text.splitlines()]
    for alert in result.alerts:
        check_form(alert, result)
    return result


def check_form(alert, result):
    assert list(alert) == KEYS
    assert alert["level"] in ("warn", "error") and re.fullmatch(r"[A-Z]+\d{3}", alert["code"])
    assert all(isinstance(alert[key], str) and alert[key] for key in ("metric", "message"))
    assert "\n" not in alert["message"] and alert["count"] & (alert["count"] - 1) == 0
    for key in "value", "limit":  # null: not finite
        assert alert[key] is None or isinstance(alert[key], (int, float))
    if None not in (alert["value"], alert["limit"]):
        assert alert["value"] > alert["limit"]
    line = f"[{alert['code']} {alert['level']} step {alert['step']}] {alert['message']}"
    assert line in result.err and all(len(text) < 300 for text in result.err.splitlines() if text.startswith("["))
    for fix in alert["fix"]:
        assert list(fix) == ["flag", "from", "to"] and fix["flag"].startswith("--")
        assert fix["from"] == getattr(result.args, fix["flag"][2:])  # a flag that exists, at the value it has
        assert fix["to"] != fix["from"]


def codes(result):
    return {(a["code"], a["level"]) for a in result.alerts}


def stops_before_step_1(code, name, folder, *flags, **more):
    """An error at step 0: exit code 3 and one line, nothing trained; with --allow CODE the run goes on to its end."""
    result = provoke(name, folder, *flags, **more)
    assert result.code == 3, result.err
    found = [a for a in result.alerts if a["code"] == code]
    assert [a["level"] for a in found] == ["error"] and found[0]["step"] == 0 and found[0]["count"] == 1
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {code}: ") and f"--allow {code}" in errors[0]
    assert "Traceback" not in result.err
    assert not list(result.folder.glob("checkpoint-*")) and not (result.folder / "final").exists()
    metrics = result.folder / "metrics.jsonl"
    assert not metrics.is_file() or '"loss"' not in metrics.read_text()
    known = strict((result.folder / "run.json").read_text())
    assert (known["status"], known["exit_code"]) == ("failed", 3)
    allowed = provoke(name, folder, *flags, **more | {"allow": [code, *more.get("allow", ())]})
    assert allowed.code == 0, allowed.err
    assert [a["level"] for a in allowed.alerts if a["code"] == code] == ["error"]
    assert strict((allowed.folder / "run.json").read_text())["alerts"][code] == 1
    return found[0]


def only_warns(code, name, folder, *flags, **more):
    result = provoke(name, folder, *flags, **more)
    assert result.code == 0, result.err
    found = [a for a in result.alerts if a["code"] == code]
    assert [a["level"] for a in found] == ["warn"], result.alerts
    return found[0]


def rows_file(folder, *rows):
    (folder / MARKER).mkdir(exist_ok=True)
    path = folder / MARKER / f"mine{len(list((folder / MARKER).iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def template(folder, text):
    path = folder / "template.jinja"
    path.write_text(text)
    return path


def model(folder, config=(), generation=(), tokenizer=None, weights=None):
    """A copy of the tiny model with other settings; tokenizer and weights are edited by a function."""
    copy = folder / f"{MARKER}-model"
    shutil.copytree(MODEL, copy)
    edit_json(copy / "config.json", lambda settings: settings.update(config))
    edit_json(copy / "generation_config.json", lambda settings: settings.update(generation))
    if tokenizer:
        edit_json(copy / "tokenizer.json", tokenizer)
    if weights:
        tensors = load_file(copy / "model.safetensors")
        weights(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def edit_json(path, edit):
    settings = json.loads(path.read_text())
    edit(settings)
    path.write_text(json.dumps(settings))


# ---- healthy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STABLE)
def test_the_healthy_recipe_raises_none(name, tmp_path):
    """The first eleven steps of the default recipe, its own batch and data: TRAIN002 looks at step 5, the streaks of
    GRPO001-002 end by then, TRAIN003 looks at 1, 2, 4, 8."""
    flags = ["--max_steps", 11, "--eval_rows", 4, "--save_every", 0, "--output_dir", tmp_path / "out"]
    result = leave(name, *flags)
    assert result.code == 0, result.err
    assert result.err == ""
    alerts = tmp_path / "out" / "alerts.jsonl"
    assert not alerts.is_file() or alerts.read_text() == ""
    assert strict((tmp_path / "out" / "run.json").read_text())["alerts"] == {}


def test_every_code_of_the_scripts_is_provoked_here():
    texts = [path.read_text() for folder in ("methods", "common") for path in (ROOT / folder).rglob("*.py")]
    used = set(re.findall(r'"([A-Z]+\d{3})"', "".join(texts)))
    here = set(re.findall(r'"([A-Z]+\d{3})"', open(__file__).read()))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    provoked = set(re.findall(r'"([A-Z]+\d{3})"', tests))  # a script's own codes by its own tests
    assert here <= used <= provoked


# ---- data ----------------------------------------------------------------------------------------


def test_data001_rows_without_a_scored_token(tmp_path):
    empty, full = {"text": ""}, {"text": f"{MARKER} 3+4=7"}
    found = stops_before_step_1("DATA001", "sft", tmp_path, "--dataset", rows_file(tmp_path, *[full] * 49, empty))
    assert found["value"] == pytest.approx(0.02) and found["limit"] == 0.01
    found = only_warns("DATA001", "sft", tmp_path, "--dataset", rows_file(tmp_path, *[full] * 149, empty))
    assert found["value"] == pytest.approx(1 / 150)


BOS = "<|system|>"  # a token that the tiny tokenizer has; here its texts begin with it


def begins_with_bos(settings):
    piece = {"SpecialToken": {"id": BOS, "type_id": 0}}
    processor = settings["post_processor"]
    processor["single"].insert(0, piece)
    processor["pair"].insert(0, piece)
    processor["special_tokens"] = {BOS: {"id": BOS, "ids": [3], "tokens": [BOS]}}


CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("begin", ("", BOS + BOS))
def test_data002_no_bos_or_two(begin, tmp_path):
    folder = model(tmp_path, tokenizer=begins_with_bos)
    edit_json(folder / "tokenizer_config.json", lambda settings: settings.update(bos_token=BOS))
    flags = ["--model", folder, "--max_length", 200, "--chat_template"]
    found = stops_before_step_1("DATA002", "dpo", tmp_path, *flags, template(tmp_path, begin + CHAT))
    assert found["value"] == 1.0
    assert provoke("dpo", tmp_path, *flags, template(tmp_path, BOS + CHAT)).alerts == []


def test_data003_completions_without_a_stop_token(tmp_path):
    endless = template(tmp_path, CHAT.replace("<|end|>", "\n"))
    for name in "sft", "dpo":
        found = stops_before_step_1("DATA003", name, tmp_path, "--chat_template", endless)
        assert found["value"] == 1.0


def test_data004_a_template_that_rewrites_history(tmp_path):
    forgets = CHAT.replace("m['content']", "('' if m['role'] == 'assistant' and not loop.last else m['content'])")
    rows = rows_file(tmp_path, *[{"messages": [ASKS, WRITES, ASKS, WRITES]}] * 3, {"messages": [ASKS, WRITES]})
    flags = ["--dataset", rows, "--chat_template", template(tmp_path, forgets)]
    found = only_warns("DATA004", "sft", tmp_path, *flags)
    # three rows of four; that each of them becomes two groups does not make five of seven
    assert found["value"] == pytest.approx(0.75)


LONG = {"prompt": "3+4=", "completion": "7" * 90, "chosen": "7" * 90, "rejected": "8" * 90}
SHORT = {"prompt": "3+4=", "completion": "7", "chosen": "7", "rejected": "8"}


@pytest.mark.parametrize("name", ("sft", "dpo"))
def test_data005_rows_over_max_length(name, tmp_path):
    flags = ["--max_length", 64, "--dataset"]
    found = stops_before_step_1("DATA005", name, tmp_path, *flags, rows_file(tmp_path, *[SHORT] * 7, *[LONG] * 3))
    assert found["value"] == pytest.approx(0.3)
    (fix,) = found["fix"]
    assert fix == {"flag": "--max_length", "from": 64, "to": 95}  # 4 of the prompt, 90, the end
    found = only_warns("DATA005", name, tmp_path, *flags, rows_file(tmp_path, *[SHORT] * 97, *[LONG] * 3))
    assert found["value"] == pytest.approx(0.03)
    assert all(fix["to"] > fix["from"] for fix in found["fix"])  # the 95th percentile is below the limit here


def test_data005_counts_the_completion_online(tmp_path):
    """--max_length bounds prompt + completion: the fix has to leave room for both."""
    rows = [{"prompt": "3" * 40, "answer": "7"}, *[{"prompt": "3+4=", "answer": "7"}] * 3]
    flags = ["--max_length", 60, "--max_completion_length", 30, "--num_generations", 2, "--dataset"]
    result = provoke("grpo", tmp_path, *flags, rows_file(tmp_path, *rows))
    (found,) = [a for a in result.alerts if a["code"] == "DATA005"]
    assert result.code == 3 and found["level"] == "error"
    assert [fix["to"] for fix in found["fix"]] == [70]


def test_data006_a_stop_token_the_generation_config_lacks(tmp_path):
    folder = model(tmp_path, generation={"eos_token_id": 0})
    for name in "sft", "grpo":
        assert only_warns("DATA006", name, tmp_path, "--model", folder, "--max_length", 200)["value"] == 1


def test_data002_and_data003_show_a_row(tmp_path):
    """What is wrong with a row is seen best in its picture, which comes before the line that ends the run."""
    endless = template(tmp_path, CHAT.replace("<|end|>", "\n"))
    result = provoke("sft", tmp_path, "--chat_template", endless)
    assert "DATA003   <|" in result.out and "eos_token_id" in result.err


def test_data007_plain_text_although_the_model_has_a_template(tmp_path):
    plain, chat = {"prompt": "3+4=", "completion": "7"}, {"prompt": [ASKS], "completion": [WRITES]}
    for rows, share in ([plain], 1.0), ([chat, chat, plain, chat], 0.25):
        found = only_warns("DATA007", "sft", tmp_path, "--dataset", rows_file(tmp_path, *rows))
        assert found["value"] == share and found["fix"] == [{"flag": "--as_chat", "from": False, "to": True}]
    result = provoke("sft", tmp_path, "--as_chat", "--dataset", rows_file(tmp_path, plain))
    assert result.code == 0 and not codes(result) & {("DATA007", "warn")}


STRICT = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('" + MARKER + "') }}{% endif %}" + CHAT


def test_data008_rows_that_the_template_refuses(tmp_path):
    """They are dropped and counted; the first is named on the screen. If all are refused, what it says ends the run."""
    good, bad = {"messages": [ASKS, WRITES]}, {"messages": [WRITES, ASKS, WRITES]}
    flags = ["--chat_template", template(tmp_path, STRICT), "--dataset"]
    found = stops_before_step_1("DATA008", "sft", tmp_path, *flags, rows_file(tmp_path, *[good] * 19, bad))
    assert found["value"] == pytest.approx(0.05)
    rows = rows_file(tmp_path, *[good] * 7, bad, *[good] * 142)
    result = provoke("sft", tmp_path, *flags, rows)
    assert result.code == 0 and codes(result) == {("DATA008", "warn")}
    assert "149 of 150 rows kept" in result.out and f"{rows}:8" in result.out
    result = provoke("sft", tmp_path, *flags, rows_file(tmp_path, bad, bad))
    assert result.code == 2 and "the chat template fails" in result.err and MARKER in result.err


def test_data009_pairs_of_one_text(tmp_path):
    good = {"prompt": [ASKS], "chosen": [WRITES], "rejected": [{"role": "assistant", "content": "#### 8"}]}
    same = good | {"rejected": [WRITES]}
    for name in "dpo", "reward", "kto":
        found = only_warns("DATA009", name, tmp_path, "--dataset", rows_file(tmp_path, same, *[good] * 3))
        assert found["value"] == 0.25
    result = provoke("dpo", tmp_path, "--dataset", rows_file(tmp_path, *[good] * 149, same))
    assert result.code == 0 and result.alerts == [] and "149 of 150 rows kept" in result.out
    result = provoke("dpo", tmp_path, "--dataset", rows_file(tmp_path, same, same))
    assert result.code == 2 and "no row is left" in result.err


FORGETS = CHAT.replace("m['content']", "(m['content'] or '')")


def test_data010_what_the_template_leaves_out_of_a_scored_turn(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    calls = {"messages": [ASKS, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    thinks = {"messages": [ASKS, WRITES | {"reasoning_content": f"{MARKER} 3 and 4"}]}
    good = {"messages": [ASKS, WRITES]}
    flags = ["--chat_template", template(tmp_path, FORGETS), "--dataset"]
    for bad in calls, thinks:
        found = stops_before_step_1("DATA010", "sft", tmp_path, *flags, rows_file(tmp_path, *[good] * 9, bad))
        assert found["value"] == pytest.approx(0.1)
        found = only_warns("DATA010", "sft", tmp_path, *flags, rows_file(tmp_path, *[good] * 149, bad))
        assert found["value"] == pytest.approx(1 / 150)


@pytest.mark.parametrize("place", ("user", "assistant"))
def test_data011_content_that_spells_a_control_token(place, tmp_path):
    """Nothing is cut there: the answer goes on to the token that the template itself wrote."""
    spells = {"role": place, "content": "3<|end|>4"}
    row = {"messages": [spells, WRITES] if place == "user" else [ASKS, spells]}
    found = only_warns("DATA011", "sft", tmp_path, "--dataset", rows_file(tmp_path, row, {"messages": [ASKS, WRITES]}))
    assert found["value"] == 0.5


def test_data012_a_scored_token_of_another_message(tmp_path):
    """Only a bug in encoding could score one: here encoding says that it did."""

    def patch(module):
        encode = module.encode_demonstration
        module.encode_demonstration = lambda *a, **k: [group | {"foreign": True} for group in encode(*a, **k)]

    assert stops_before_step_1("DATA012", "sft", tmp_path, patch=patch)["value"] == 1.0


# ---- model and training --------------------------------------------------------------------------


def test_model001_a_config_that_lies(tmp_path):
    """Llama's forward knows no logit_scale; a config that has one looks like a family that does."""
    folder = model(tmp_path, config={"logit_scale": 2.0})
    for name in "sft", "grpo":
        # what is exported and what samples is compared with what trains, too
        flags, allow = ["--model", folder, "--max_length", 200], ["CKPT001", "GRPO004"]
        assert stops_before_step_1("MODEL001", name, tmp_path, *flags, allow=allow)["value"] > 0.1


def test_model002_a_row_beyond_what_the_model_was_made_for(tmp_path):
    """Rotary embeddings go on beyond max_position_embeddings, and say nothing sensible there."""
    folder = model(tmp_path, config={"max_position_embeddings": 12})
    found = only_warns("MODEL002", "sft", tmp_path, "--model", folder, "--max_length", 200)
    assert found["limit"] == 12 < found["value"]


def plant_nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")


@pytest.mark.parametrize("name", ("sft", "dpo", "grpo"))
def test_model001_a_weight_that_is_not_a_number(name, tmp_path):
    result = provoke(name, tmp_path, "--model", model(tmp_path, weights=plant_nan), "--max_length", 200)
    assert result.code == 3, result.err
    assert ("MODEL001", "error") in codes(result)


def test_train001_three_steps_that_are_not_finite(tmp_path):
    """A learning rate of 1e15: the first step makes weights whose logits are not finite, the next three are skipped."""
    result = provoke("sft", tmp_path, "--learning_rate", 1e15, steps=9)
    assert result.code == 3
    found = [a for a in result.alerts if a["code"] == "TRAIN001"]
    assert found[0]["level"] == "error" and found[0]["step"] == 2
    assert found[0]["fix"] == [{"flag": "--learning_rate", "from": 1e15, "to": 5e14}]
    steps = [strict(line)["step"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps in ([1, 2, 3], [1, 2, 3, 4])  # whether the last skipped step is still logged does not matter
    dumps = sorted(result.folder.glob("debug/*"))
    assert len(dumps) == 3
    for path in dumps:  # the rows of the step: enough to look at it again
        rows = strict(path.read_text())
        assert len(rows) == 2 and all(len(row) == 3 for row in rows)
    assert not (result.folder / "final").exists()


def test_train001_a_single_bad_step_is_skipped_and_survived(tmp_path):
    def patch(module):
        calls, loss = [], module.sft_loss

        def bad_once(*args):
            calls.append(0)
            return loss(*args) * (float("nan") if len(calls) == 2 else 1)

        module.sft_loss = bad_once

    result = provoke("sft", tmp_path, patch=patch, steps=4)
    assert result.code == 0 and [a["step"] for a in result.alerts if a["code"] == "TRAIN001"] == [2]
    losses = [strict(line)["loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[1] is None and None not in (losses[0], losses[2], losses[3])


def test_train002_a_learning_rate_below_the_precision(tmp_path):
    result = provoke("sft", tmp_path, "--learning_rate", 1e-20, steps=6)
    assert result.code == 0
    assert [(a["level"], a["step"]) for a in result.alerts if a["code"] == "TRAIN002"] == [("error", 5)]


def test_train002_no_gradient(tmp_path):
    def patch(module):
        loss = module.sft_loss
        module.sft_loss = lambda *args: 0 * loss(*args)

    result = provoke("sft", tmp_path, patch=patch, steps=3)
    assert [(a["level"], a["step"]) for a in result.alerts if a["code"] == "TRAIN002"] == [("error", 3)]


def test_train002_a_gradient_of_rounding_size(tmp_path):
    """Pairs of one text cancel, but for rounding; Adam would make whole steps of that."""

    def patch(module):
        fit = module.fit
        module.fit = lambda groups, *more: fit([unmarked(group) for group in groups], *more)

    def unmarked(group):
        return {name: value for name, value in group.items() if name != "equal"}

    answer = {"role": "assistant", "content": "#### 7"}
    same = {"prompt": [ASKS], "chosen": [answer], "rejected": [answer]}
    flags = ["--dataset", rows_file(tmp_path, *[same] * 8)]
    result = provoke("dpo", tmp_path, *flags, patch=patch, steps=3)
    assert [(a["level"], a["step"]) for a in result.alerts if a["code"] == "TRAIN002"] == [("error", 3)]


def test_train002_not_with_a_learning_rate_of_0(tmp_path):
    """Asked for, to see that nothing else moves the metrics."""
    assert provoke("sft", tmp_path, "--learning_rate", 0, steps=6).alerts == []


def test_train003_clipping_that_does_not_clip(tmp_path):
    def patch(module):
        parallel.min = lambda one, factor: one  # the factor of the gradients

    result = provoke("sft", tmp_path, "--max_grad_norm", 1e-3, patch=patch)
    assert result.code == 0
    (found,) = [a for a in result.alerts if a["code"] == "TRAIN003"]
    assert found["level"] == "error" and found["limit"] == pytest.approx(1.01e-3)


@pytest.mark.parametrize("name", ("sft", "dpo", "grpo"))
def test_train003_a_denominator_that_is_not_the_scored_tokens(name, tmp_path):
    """A fork whose denominator is one token short of what its micro-batches score."""

    def patch(module):
        count_scored = module.count_scored
        module.count_scored = lambda groups: count_scored(groups) - 1

    result = provoke(name, tmp_path, patch=patch)
    assert ("TRAIN003", "error") in codes(result), result.err


# ---- preferences ---------------------------------------------------------------------------------


def test_pref001_a_reference_that_is_not_the_start(tmp_path):
    def patch(module):
        attach = module.attach_reference

        def moved(policy, groups, *more):
            attach(policy, groups, *more)
            for group in groups:
                group["completions"][0]["ref_logprob"] += 1.0  # beta 0.1: the margin moves by 0.1

        module.attach_reference = moved

    found = stops_before_step_1("PREF001", "dpo", tmp_path, patch=patch)
    assert 0.09 < found["value"] < 0.11


# ---- online --------------------------------------------------------------------------------------

REWARDS = f'''
import time
calls = []
def constant(prompts, completions, **columns):
    return [0.5] * len(completions)
def by_length(prompts, completions, **columns):
    return [float(len(c[0]["content"])) for c in completions]
def counts(prompts, completions, **columns):
    calls.extend(completions)
    return [float(i) for i in range(len(completions))]
def lost(prompts, completions, **columns):
    return [None if i % 4 == 0 else float(i) for i in range(len(completions))]
def lost_one(prompts, completions, **columns):
    return [None if i == 0 else float(i) for i in range(len(completions))]
def lost_later(prompts, completions, **columns):
    calls.append(0)
    return [None if len(calls) > 2 and i % 2 else float(i) for i in range(len(completions))]
def none(prompts, completions, **columns):
    return [None] * len(completions)
def raises(prompts, completions, **columns):
    raise RuntimeError("{MARKER}")
def hangs(prompts, completions, **columns):
    time.sleep(60)
def raises_first(prompts, completions, **columns):
    calls.append(0)
    if len(calls) == 1:
        raise RuntimeError("{MARKER}")
    return [float(i) for i in range(len(completions))]
def raises_later(prompts, completions, **columns):
    calls.append(0)
    if len(calls) > 2:
        raise RuntimeError("{MARKER}")
    return [float(i) for i in range(len(completions))]
def mostly_constant(prompts, completions, **columns):
    return [float(i == 0) for i in range(len(completions))]
def constant_later(prompts, completions, **columns):
    calls.append(0)
    return [float(i == 0) if len(calls) <= 10 else 0.5 for i in range(len(completions))]
'''
ONLINE = ["--num_generations", 2, "--steps_per_generation", 1, "--num_iterations", 1, "--beta", 0]
QUICK = {"allow": ["GRPO002"]}  # four tokens are no answer, but enough where only the rewards matter


def reward(folder, function):
    path = folder / f"{MARKER}.py"
    path.write_text(REWARDS)
    return [*ONLINE, "--max_completion_length", 4, "--reward", f"{path}:{function}"]


def levels(result, code):
    return [(a["step"], a["level"]) for a in result.alerts if a["code"] == code]


def test_grpo001_rewards_that_never_differ(tmp_path):
    result = provoke("grpo", tmp_path, *reward(tmp_path, "constant"), steps=10, **QUICK)
    assert result.code == 0
    assert {level for _, level in levels(result, "GRPO001")} == {"error"}


def test_grpo001_warns_where_most_groups_are_silent(tmp_path):
    """One group of six differs: 0.83 of the groups teach nothing."""
    flags = [*reward(tmp_path, "mostly_constant"), "--batch_size", 6]
    result = provoke("grpo", tmp_path, *flags, steps=10, **QUICK)
    assert {level for _, level in levels(result, "GRPO001")} == {"warn"}


def test_grpo001_rises_to_an_error(tmp_path):
    """Ten steps with one live group of six, then none: the warning must not hide what comes after it."""
    flags = [*reward(tmp_path, "constant_later"), "--batch_size", 6]
    result = provoke("grpo", tmp_path, *flags, steps=21, **QUICK)
    assert list(dict.fromkeys(level for _, level in levels(result, "GRPO001"))) == ["warn", "error"]


def test_grpo002_no_room_to_stop(tmp_path):
    found = stops_before_step_1("GRPO002", "grpo", tmp_path, *ONLINE, "--max_completion_length", 2)
    assert found["fix"] == [{"flag": "--max_completion_length", "from": 2, "to": 4}] and found["value"] == 1.0


def test_grpo002_warns_where_many_do_not_stop(tmp_path):
    """Answers take 27 to 33 tokens: 28 hold about a third of them."""
    flags = [*ONLINE, "--num_generations", 8, "--max_completion_length", 28, "--batch_size", 8, "--learning_rate", 0]
    result = provoke("grpo", tmp_path, *flags, rows=64, steps=4)
    shares = [strict(line)["truncated_frac"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0.5 < share < 0.95 for share in shares)  # or this test is about something else
    assert result.code == 0 and {level for _, level in levels(result, "GRPO002")} == {"warn"}


def test_grpo002_rises_to_an_error(tmp_path):
    """Completions that grow until none stops any more: the worst case begins as a warning."""

    def patch(module):
        sample, calls = sampling.Sampler.sample, []

        def grow(self, groups, *more):
            sample(self, groups, *more)
            calls.append(0)
            for i, completion in enumerate(c for g in groups for c in g["completions"]):
                completion["stopped"] = completion["stopped"] and len(calls) <= 4 and i % 4 == 0

        sampling.Sampler.sample = grow

    result = provoke("grpo", tmp_path, *ONLINE, patch=patch, steps=8)
    assert list(dict.fromkeys(level for _, level in levels(result, "GRPO002"))) == ["warn", "error"]


THREE_IN_A_ROW = "error: GRPO003: three rollouts in a row got no reward at all. Check --reward."


@pytest.mark.parametrize("function, flags", (("none", []), ("raises", []), ("hangs", ["--reward_timeout", 1])))
def test_grpo003_no_reward_at_all(function, flags, tmp_path):
    """A function that says so ends the run at once; calls that fail may be accidents, but not three in a row. Allowed
    or not: without any reward there is nothing to go on with."""
    for allow in ["GRPO002"], ["GRPO002", "GRPO003"]:
        result = provoke("grpo", tmp_path, *reward(tmp_path, function), *flags, steps=9, allow=allow)
        at_once = function == "none" and len(allow) == 1
        first = 0 if function == "none" else 1
        assert levels(result, "GRPO003") == [(first, "error"), (2, "error")][: 1 if at_once else 2]
        assert result.code == 3 and (THREE_IN_A_ROW in result.err) == (not at_once)
        assert not (result.folder / "final").exists()


def test_grpo003_some_without_reward(tmp_path):
    found = stops_before_step_1("GRPO003", "grpo", tmp_path, *reward(tmp_path, "lost"), **QUICK)
    assert found["value"] == 0.25
    for path in tmp_path.rglob("samples.jsonl"):  # null where there is no reward: NaN is not JSON
        rows = [strict(line) for line in path.read_text().splitlines()]
        assert None in [row["reward"] for row in rows] and [None] in [row["parts"] for row in rows]
    flags = [*reward(tmp_path, "lost_one"), "--batch_size", 8]
    assert only_warns("GRPO003", "grpo", tmp_path, *flags, **QUICK)["value"] == pytest.approx(1 / 16)


def test_grpo003_a_reward_that_breaks_later(tmp_path):
    result = provoke("grpo", tmp_path, *reward(tmp_path, "lost_later"), steps=4, **QUICK)  # half of them: it goes on
    assert result.code == 0 and levels(result, "GRPO003")[0] == (3, "error")
    result = provoke("grpo", tmp_path, *reward(tmp_path, "raises_later"), steps=9, **QUICK)  # all of them: the end
    assert result.code == 3 and levels(result, "GRPO003") == [(3, "error"), (4, "error")]
    assert THREE_IN_A_ROW in result.err and len((result.folder / "metrics.jsonl").read_text().splitlines()) == 4
    assert not (result.folder / "final").exists()


def test_grpo003_held_out_rows_without_a_reward(tmp_path):
    """They have no answer to compare with: not an accuracy of 0, and said before step 1."""
    rows = [{"prompt": "1+1="}, {"prompt": "2+2="}]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*ONLINE, "--eval_dataset", heldout, "--eval_samples", 2]
    result = provoke("grpo", tmp_path, *flags, allow=["GRPO002"])
    assert result.code == 3 and levels(result, "GRPO003") == [(0, "error")]
    assert result.alerts[0]["metric"] == "eval/no_reward_frac" and result.alerts[0]["value"] == 1
    result = provoke("grpo", tmp_path, *flags, steps=1, allow=["GRPO002", "GRPO003"])
    assert result.code == 0 and levels(result, "GRPO003") == [(0, "error"), (1, "error")]
    first = strict((result.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval/accuracy"] is None and first["eval/no_reward_frac"] == 1
    assert strict((result.folder / "run.json").read_text())["last"]["eval/accuracy"] is None


def test_grpo003_one_call_that_fails_before_step_1(tmp_path):
    """Of the first evaluation, which then has no accuracy, or of the first rollout: said, and the run goes on."""
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"prompt": "1+1="}) + "\n")
    flags = [*reward(tmp_path, "raises_first"), "--eval_samples", 0]
    for more, metric in (["--eval_dataset", heldout], "eval/no_reward_frac"), ([], "no_reward_frac"):
        result = provoke("grpo", tmp_path, *flags, *more, steps=2, **QUICK)
        assert result.code == 0 and levels(result, "GRPO003") == [(1, "error")]
        (found,) = [alert for alert in result.alerts if alert["code"] == "GRPO003"]
        assert (found["metric"], found["value"]) == (metric, 1)
        lines = [strict(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["no_reward_frac"] for line in lines if "loss" in line] == ([0, 0] if more else [1, 0])
        assert not more or lines[0]["eval/accuracy"] is None


def test_alerts_are_counted_and_written_at_powers_of_two(tmp_path):
    """A condition that stays is said again after two, four, eight times: who reads the file sees that it stays."""
    result = provoke("grpo", tmp_path, *reward(tmp_path, "lost"), steps=5, allow=["GRPO002", "GRPO003"])
    assert [a["count"] for a in result.alerts if a["code"] == "GRPO003"] == [1, 2, 4]
    assert strict((result.folder / "run.json").read_text())["alerts"]["GRPO003"] == 5


def softer(factor, after=0):
    """A sampler whose last norm is scaled: another temperature than the trainer's."""

    def patch(module):
        refresh, calls = module.refresh, []

        def wrong(sampler, policy):
            refresh(sampler, policy)
            calls.append(0)
            if len(calls) > after:
                with torch.no_grad():
                    sampler.lm.model.norm.weight *= factor

        module.refresh = wrong

    return patch


def test_grpo004_a_sampler_that_is_not_the_policy(tmp_path):
    found = stops_before_step_1("GRPO004", "grpo", tmp_path, *ONLINE, patch=softer(0.3))
    assert found["metric"] == "sampler_gap / entropy"
    only_warns("GRPO004", "grpo", tmp_path, *ONLINE, patch=softer(1 / 1.05))


def test_grpo004_rises_to_an_error(tmp_path):
    def patch(module):
        softer(1 / 1.05)(module)
        softer(0.4, after=2)(module)

    result = provoke("grpo", tmp_path, *ONLINE, patch=patch, steps=4)
    assert levels(result, "GRPO004")[0] == (0, "warn") and "error" in {level for _, level in levels(result, "GRPO004")}


def test_grpo005_the_same_weights_say_something_else(tmp_path):
    def patch(module):
        attach = module.attach_logprobs

        def moved(run, model, groups, name):
            attach(run, model, groups, name)
            for completion in (c for g in groups for c in g["completions"] if name == "old_logprobs"):
                completion[name] = completion[name] + 0.01

        module.attach_logprobs = moved

    stops_before_step_1("GRPO005", "grpo", tmp_path, *ONLINE, "--num_iterations", 2, patch=patch)


# ---- checkpoint ----------------------------------------------------------------------------------


def spoil(change):
    def patch(module):
        write = checkpoint.write_checkpoint

        def spoiled(run, step, folder, *more):
            write(run, step, folder, *more)
            change(folder)

        checkpoint.write_checkpoint = spoiled

    return patch


def other_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lost_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def nan_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    plant_nan(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def untied(folder):
    edit_json(folder / "config.json", lambda settings: settings.update(tie_word_embeddings=False))


@pytest.mark.parametrize("change", (other_weights, lost_weight, nan_weight, untied))
def test_ckpt001_what_was_saved_is_not_what_was_trained(change, tmp_path):
    result = provoke("sft", tmp_path, patch=spoil(change))
    assert result.code == 3, result.err
    assert codes(result) == {("CKPT001", "error")}
    assert not list(result.folder.glob("checkpoint-*")) and not (result.folder / "final").exists()


def test_ckpt001_at_the_end_is_not_before_step_1(tmp_path):
    """The rehearsal is good and the last save is not: said with the step it happened at."""

    def later(folder):
        if "rehearsal" not in folder.name:
            other_weights(folder)

    result = provoke("sft", tmp_path, patch=spoil(later), steps=2)
    assert result.code in (0, 3) and {*levels(result, "CKPT001")} == {(2, "error")}


def test_ckpt001_not_for_what_bf16_rounds(tmp_path):
    """Weights that have moved a little are not on bf16's grid any more: saving rounds them, and that is no damage."""
    result = provoke("dpo", tmp_path, "--save_dtype", "bfloat16", "--learning_rate", 1e-3, steps=5)
    assert result.code == 0 and levels(result, "CKPT001") == [], result.err
