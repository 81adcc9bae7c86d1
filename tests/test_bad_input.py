"""What users get wrong ends with one line that says what is wrong, where, and what to type; and with nothing lost.

Most of this runs in forked children (`leave`); one case per exit code is a real `python methods/x.py`, too.
"""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PARSED, ROOT, SCRIPTS, STABLE, once, script, tiny_flags, tiny_rows, try_train

from common.runtime import checkpoint, launch
from common.runtime.flags import STOP


def leave(name, *flags, patch=None, limit=60):
    """The script's way out, in a forked child: parse_args, then launch(main, args, file), as its last line does.
    Returns code (negative: a signal; None: still running after `limit` seconds), out, err."""
    module = script(name)  # imported here, once: a fork then costs nothing
    folder = Path(tempfile.mkdtemp(prefix="leave"))
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            for number, stream in (1, "stdout"), (2, "stderr"):  # pytest replaced the objects, too
                os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
                setattr(sys, stream, os.fdopen(number, "w", buffering=1))
            gc.freeze()  # as in conftest
            torch.set_num_threads(1)
            if patch:
                patch(module)
            args = module.parse_args([str(flag) for flag in flags])
            launch.launch(module.main, args, module.__file__)
            os._exit(0)
        except SystemExit as e:
            sys.stdout.flush()
            os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException:  # what a terminal would show; the assertions are the parent's
            traceback.print_exc()
        finally:
            os._exit(1)
    end, status = time.monotonic() + limit, (0, 0)
    while not status[0] and time.monotonic() < end:
        status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    if not status[0]:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    out, err = ((folder / stream).read_text(errors="replace") for stream in ("stdout", "stderr"))
    shutil.rmtree(folder)
    return SimpleNamespace(code=os.waitstatus_to_exitcode(status[1]) if status[0] else None, out=out, err=err)


MODEL = ROOT / "common" / "tiny" / "model"
ASKS, WRITES = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}
GOOD = {  # one row each, and columns that are not enough
    "sft": ({"prompt": "3+4=", "completion": "7"}, {"prompt": "3+4="}),
    "dpo": ({"prompt": "3+4=", "chosen": "7", "rejected": "8"}, {"prompt": "3+4=", "chosen": "7"}),
    "reward": ({"prompt": "3+4=", "chosen": "7", "rejected": "8"}, {"prompt": "3+4=", "rejected": "7"}),
    "kto": ({"prompt": "3+4=", "completion": "7", "label": True}, {"prompt": "3+4=", "completion": "7"}),
    "grpo": ({"prompt": "3+4=", "answer": "7"}, {"question": "3+4=", "answer": "7"}),
    "rloo": ({"prompt": "3+4=", "answer": "7"}, {"question": "3+4=", "answer": "7"}),
    "distillation": ({"prompt": "3+4=", "completion": "7"}, {"prompt": "3+4="}),
    "experimental/sdpo": ({"prompt": "3+4=", "answer": "7"}, {"question": "3+4=", "answer": "7"}),
    "experimental/sdft": ({"prompt": "3+4=", "privileged_context": "7"}, {"prompt": "3+4=", "answer": "7"}),
}


def attempt(name, folder, *flags, **more):
    """A run of two steps on eight of the script's tiny rows into folder/out; later flags win."""
    folder.mkdir(parents=True, exist_ok=True)
    data = tiny_rows(name, folder / "rows.jsonl", 8)
    usual = ["--dataset", data, "--eval_dataset", "", "--batch_size", 2, "--max_steps", 2]
    return leave(name, *tiny_flags(name), *usual, "--output_dir", folder / "out", *flags, **more)


def refused(result, folder, *needles, code=2):
    """One line `error: ...` with what is needed to act; no traceback, nothing that looks finished."""
    assert result.code == code, (result.code, result.err)
    assert "Traceback" not in result.err + result.out
    lines = [line for line in result.err.splitlines() if line]
    if code == 2:
        assert len(lines) == 1, result.err  # neither warnings before it, nor an echo after
    assert lines[-1].startswith("error: ") and len(lines[-1]) < 1000 and lines[-1].isprintable()
    for needle in needles:
        assert str(needle) in lines[-1]
    out = folder / "out"
    assert not (out / "final").exists() and not list(out.glob("checkpoint-*"))
    if (out / "run.json").is_file():
        known = json.loads((out / "run.json").read_text())
        assert (known["status"], known["exit_code"]) == ("failed", code)
    return lines[-1]


def write_rows(folder, *rows):
    path = folder / "mine.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", once("sft", "grpo"))
@pytest.mark.parametrize("flags, needles", (
    (["--learning_rat", "3"], ["--learning_rat", "--learning-rate"]),  # the nearest one is named
    (["--max_legnth", "3"], ["--max_legnth", "--max-length"]),
    (["--batch_size", "many"], ["--batch-size", "many"]),
    (["--report_to", "nowhere"], ["--report-to", "nowhere", "wandb"]),
    (["--overlong", "cut"], ["--overlong", "drop", "truncate_prompt"]),
    (["--output_dir"], ["--output-dir"]),
    (["stray"], ["stray"]),
), ids=lambda x: "_".join(x).strip("-"))  # fmt: skip
def test_flags_that_are_none(name, flags, needles):
    """The parser's own messages, in its own frame."""
    result = leave(name, *flags)
    assert result.code == 2 and "Traceback" not in result.err and result.out == ""
    assert all(needle in result.err for needle in needles), result.err


ZERO = "warmup_steps eval_every save_every eval_samples update_after max_steps"  # 0 turns off, or means at once
ZERO = [*ZERO.split(), "top_k", "loss_top_k"]


def numbers(name):
    """Numeric flags of a script and values that make no sense for any of them."""
    for field in fields(script(name).Args):
        kind = str(field.type)
        real = type(field.default) is float or "float |" in kind
        if field.name == "seed" or not real and type(field.default) is not int:
            continue
        below = [] if field.name in ("reward_bar", "success_reward_threshold") else ["-2"]  # rewards may be anything
        for value in (*below, *(["nan", "inf"] if real else ["0"])):
            if value != "0" or field.name not in ZERO:
                yield f"--{field.name}", value


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_that_make_no_sense(name, request):
    """All of them in one child: parsing is all it takes. Of an experimental script those that its parent has not, and
    with --slow the others, too."""
    tried, accepted = list(numbers(name)), []
    assert len(tried) > 30
    if name not in STABLE and not request.config.getoption("--slow"):
        parent = PARSED[f"methods/{name}.py"].parent.removeprefix("methods/").removesuffix(".py")
        inherited = [] if parent == "none" else list(numbers(parent))
        tried = [number for number in tried if number not in inherited]

    def patch(module):
        for flag, value in tried:
            try:
                module.parse_args([flag, value])
                print(f"ACCEPTED {flag} {value}")
            except SystemExit as e:
                assert e.code == 2, (flag, value, e.code)
        raise SystemExit(0)

    result = leave(name, patch=patch)
    assert result.code == 0, result.err
    accepted = [line for line in result.out.splitlines() if line.startswith("ACCEPTED")]
    assert accepted == []
    for (flag, value), line in zip(tried, result.err.splitlines(), strict=True):
        assert line.startswith(f"error: {flag} ") and "must be" in line, (flag, value, line)


@pytest.mark.parametrize("flags", (
    ["--temperature", 0], ["--adam_beta1", 1.5], ["--adam_beta2", 1], ["--num_generations", 1],
    ["--num_train_epochs", 0, "--max_steps", -1], ["--reward_timeout", 0], ["--seed", 2**70],
    ["--learning_rate", 1e400],
), ids=lambda flags: "_".join(map(str, flags)).strip("-"))  # fmt: skip
def test_numbers_at_the_edge(flags, tmp_path):
    """Each may have a meaning or be refused; a traceback is neither."""
    result = attempt("grpo", tmp_path, "--max_steps", 1, *flags)
    if result.code != 0:
        refused(result, tmp_path, flags[0])


@pytest.mark.parametrize("name, flags, needle", (
    ("dpo", ["--loss_type", "exo_pair", "--label_smoothing", 0], "--label_smoothing 0"),  # log 0
    ("grpo", ["--loss_type", "cispo"], "--epsilon_high 0.2"),  # its cap on the ratio: every token would be cut
    ("grpo", ["--loss_type", "cispo", "--epsilon_high", 0.9], "--epsilon_high 0.9"),
    ("grpo", ["--importance_sampling_level", "sequence"], "--loss_type dapo"),  # GSPO with a mean over tokens
    ("grpo", ["--num_generations", 1], "--num_generations"),  # the mean of one, and the mean of no others
    ("rloo", ["--num_generations", 1], "--num_generations"),
    ("rloo", ["--reward_clip_range", 1, 0], "--reward_clip_range"),
), ids=lambda x: "_".join(map(str, x)).strip("-") if isinstance(x, list) else None)  # fmt: skip
def test_flags_that_have_no_meaning_together(name, flags, needle, tmp_path):
    """Through the whole command line: the tests of each loss show the rules, this that main asks for them."""
    refused(attempt(name, tmp_path, *flags), tmp_path, needle)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_kwargs_that_are_not_json(tmp_path):
    for i, text in enumerate(("{thinking: no}", "", "[1]")):
        folder = tmp_path / str(i)
        refused(attempt("sft", folder, "--chat_template_kwargs", text), folder, "--chat_template_kwargs")


def test_a_tracker_that_is_not_installed(tmp_path):
    hide = lambda module: sys.modules.update(wandb=None)  # noqa: E731  the import then fails
    result = attempt("sft", tmp_path, "--report_to", "wandb", patch=hide)
    refused(result, tmp_path, "--report_to wandb", "pip install wandb")


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GOOD))
def test_missing_columns(name, tmp_path):
    good, bad = GOOD[name]
    data = write_rows(tmp_path, *[good] * 3, bad)
    line = refused(attempt(name, tmp_path, "--dataset", data), tmp_path, "mine.jsonl:4", "--rename")
    assert "wanted" in line and "found" in line
    assert all(repr(key) in line for key in bad) and all(key in line for key in good if key != "answer")


CASES = {
    "empty file": ([], ["mine.jsonl", "no rows"]),
    "blank lines only": (["", "  "], ["mine.jsonl", "no rows"]),
    "broken line": ([GOOD["sft"][0], '{"prompt": "a", "comp'], ["mine.jsonl:2"]),
    "a list per line": ([GOOD["sft"][0], "[1, 2]"], ["mine.jsonl:2", "object"]),
    "a number as text": ([{"prompt": "3+4=", "completion": 7}], ["mine.jsonl:1", "completion", "7"]),
    "null": ([{"prompt": "3+4=", "completion": None}], ["mine.jsonl:1", "completion"]),
    "messages as text": ([{"messages": "3+4=7"}], ["mine.jsonl:1", "messages", "role"]),
    "no messages": ([{"messages": []}], ["mine.jsonl:1", "messages"]),
    "unknown role": ([{"messages": [ASKS | {"role": "wizard"}, WRITES]}], ["mine.jsonl:1", "wizard", "assistant"]),
    "nobody answers": ([{"messages": [ASKS]}], ["mine.jsonl:1", "assistant"]),
    "content is a number": ([{"messages": [ASKS, {"role": "assistant", "content": 7}]}], ["mine.jsonl:1", "7"]),
    "an image": ([{"messages": [{"role": "user", "content": [{"type": "image"}]}, WRITES]}], ["mine.jsonl:1", "image"]),
    "mixed": ([{"prompt": "3+4=", "completion": [WRITES]}, {"prompt": [ASKS], "completion": "7"}], ["mine.jsonl:2"]),
    "half a surrogate": (['{"prompt": "3+4=", "completion": "\\ud800"}'], ["mine.jsonl:1"]),
    "not UTF-8": (None, ["mine.jsonl:1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_that_cannot_be_read(case, tmp_path):
    rows, needles = CASES[case]
    data = write_rows(tmp_path, *(rows or []))
    if rows is None:
        data.write_bytes(b'{"prompt": "3+4=", "completion": "\xff\xfe"}\n')
    refused(attempt("sft", tmp_path, "--dataset", data), tmp_path, *needles)


@pytest.mark.parametrize("flags, needles", (
    (["--dataset", "no/such/rows.jsonl"], ["no/such/rows.jsonl", "--dataset"]),
    (["--dataset", "no/such-dataset"], ["no/such-dataset"]),
    (["--dataset", "tiny:nothing"], ["nothing", "--dataset"]),
    (["--dataset", ""], ["--dataset"]),
    (["--eval_dataset", "no/such/rows.jsonl"], ["no/such/rows.jsonl"]),
    (["--rename", "nonsense"], ["--rename nonsense", "completion"]),
    (["--rename", "nonsense:completion"], ["--rename", "nonsense"]),
    (["--rename", "prompt:"], ["--rename"]),
    (["--rename", ":"], ["--rename"]),
    (["--chat_template", "no/such.jinja"], ["no/such.jinja"]),
    (["--max_length", 40, "--overlong", "error"], ["--max_length 40", "--overlong drop"]),
    (["--max_length", 2, "--allow", "DATA005"], ["--max_length", "no row"]),
), ids=lambda x: "_".join(map(str, x)).strip("-")[:40])  # fmt: skip
def test_flags_that_do_not_fit_the_data(flags, needles, tmp_path):
    result = attempt("sft", tmp_path, *flags)
    alerts = [line for line in result.err.splitlines() if line.startswith("[DATA005")]
    result.err = "\n".join(line for line in result.err.splitlines() if line not in alerts)  # asked for by --allow
    refused(result, tmp_path, *needles)


def test_a_template_that_fails(tmp_path):
    path = tmp_path / "broken.jinja"
    for text in "{{ messages[0].content.no.such }}", "{% for %}", "{{ raise_exception('three\nlines\nof text') }}":
        path.write_text(text)
        folder = tmp_path / str(len(text))
        refused(attempt("sft", folder, "--chat_template", path), folder, "--chat_template")


@pytest.mark.parametrize("name", STABLE)
def test_no_room_at_all(name, tmp_path):
    """Every row is too long: a health error, with the flag to change."""
    result = attempt(name, tmp_path, "--max_length", 45)
    refused(result, tmp_path, "DATA005", "--allow DATA005", code=3)
    assert "try --max_length" in result.err


def test_prompts_that_leave_no_room_for_completions(tmp_path):
    flags = ["--max_length", 60, "--max_completion_length", 60]
    for allow in [], ["--allow", "DATA005"]:
        result = attempt("grpo", tmp_path / str(len(allow)), *flags, *allow)
        assert result.code in (2, 3) and "--max_length" in result.err
        assert "Traceback" not in result.err and not list(tmp_path.glob("*/out/final"))


# ---- model ---------------------------------------------------------------------------------------


def model(folder, *without, **edits):
    """A copy of the tiny model without some files, and with settings changed: config={...}."""
    copy = folder / "model"
    shutil.copytree(MODEL, copy)
    for name in without:
        (copy / name).unlink()
    for name, settings in edits.items():
        path = copy / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return copy


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("without, needles", (
    (["model.safetensors"], ["--model", "safetensors"]),
    (TOKENIZER, ["tokenizer"]),
    (["tokenizer.json"], ["tokenizer"]),
    (["config.json"], []),
    (["config.json", "model.safetensors", *TOKENIZER, "generation_config.json", "chat_template.jinja"], ["--model"]),
    (["chat_template.jinja"], ["chat template", "--chat_template FILE", "rows.jsonl:1"]),
), ids=lambda x: "_".join(map(str, x))[:40])  # fmt: skip
def test_models_that_lack_a_part(without, needles, tmp_path):
    flags = ["--max_length", 200, "--model", model(tmp_path, *without)]
    refused(attempt("sft", tmp_path, *flags), tmp_path, *needles)


@pytest.mark.parametrize("name", ("no/such-model", "./no/such/folder", "/no/such/folder", "model.gguf", ""))
def test_models_that_do_not_exist(name, tmp_path):
    refused(attempt("sft", tmp_path, "--max_length", 200, "--model", name), tmp_path, "--model", name)


def test_a_weights_file_that_was_cut_off(tmp_path):
    folder = model(tmp_path)
    with open(folder / "model.safetensors", "r+b") as f:
        f.truncate(500_000)
    refused(attempt("sft", tmp_path, "--max_length", 200, "--model", folder), tmp_path, "--model")


def test_weights_that_a_pickle_holds(tmp_path):
    folder = model(tmp_path, "model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    refused(attempt("sft", tmp_path, "--max_length", 200, "--model", folder), tmp_path, "--model", "safetensors")


def test_weights_that_lack_a_tensor(tmp_path):
    folder = model(tmp_path, config={"num_hidden_layers": 4})
    refused(attempt("sft", tmp_path, "--max_length", 200, "--model", folder), tmp_path, "--model", "model.layers.3")


def test_weights_of_another_shape(tmp_path):
    folder = model(tmp_path, config={"intermediate_size": 200})
    refused(attempt("sft", tmp_path, "--max_length", 200, "--model", folder), tmp_path, "--model")


def test_a_tokenizer_larger_than_the_model(tmp_path):
    folder = model(tmp_path)
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": 103, "content": "<|more|>"})
    path.write_text(json.dumps(settings))
    refused(attempt("sft", tmp_path, "--max_length", 200, "--model", folder), tmp_path, "104", "103", "tokenizer")


@pytest.mark.parametrize("config", (
    {"model_type": "no-such-model"},
    {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    {"model_type": "my-own", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}},
), ids=lambda config: config["model_type"])  # fmt: skip
def test_models_that_are_not_for_this(config, tmp_path):
    """Also one that brings its own code, which is not run."""
    folder = model(tmp_path, config=config)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(attempt("sft", tmp_path, "--max_length", 200, "--model", folder), tmp_path, "--model")
    assert not (tmp_path / "ran").exists()


def test_a_config_that_is_not_json(tmp_path):
    for name in "config.json", "tokenizer.json":
        folder = model(tmp_path / name)
        (folder / name).write_text("{")
        flags = ["--max_length", 200, "--model", folder]
        refused(attempt("sft", tmp_path / name, *flags), tmp_path / name, "model")


# ---- rewards -------------------------------------------------------------------------------------

REWARDS = """
import sys, time
def short(prompts, completions, **columns): return [1.0]
def text(prompts, completions, **columns): return ["1.0"] * len(completions)
def one_number(prompts, completions, **columns): return 1.0
def nothing(prompts, completions, **columns): return None
def nested(prompts, completions, **columns): return [[1.0]] * len(completions)
def nan(prompts, completions, **columns): return [float("nan")] * len(completions)
def infinite(prompts, completions, **columns): return [float("inf")] * len(completions)
def none(prompts, completions, **columns): return [None] * len(completions)
def raises(prompts, completions, **columns): raise KeyError("line one\\nline two")
def leaves(prompts, completions, **columns): sys.exit(0)
def hangs(prompts, completions, **columns): time.sleep(60)
def stubborn(prompts, completions, **columns):
    rewards = []
    for completion in completions:
        try:
            time.sleep(60)
        except Exception:  # as users guard against one bad completion: it must not eat the time limit
            rewards.append(0.0)
    return rewards
def other_columns(prompts, completions, nosuch): return [1.0] * len(prompts)
def fine(prompts, completions, **columns): return [float(i) for i in range(len(completions))]
def greedy(prompts, completions, **columns):
    columns["answer"].clear()  # its own copy
    return [float(i) for i in range(len(completions))]
def many_kinds(prompts, completions, **columns):
    import numpy
    return [True, numpy.float64(0.5), numpy.float32(0.25), numpy.int64(2)] * (len(completions) // 4)
not_a_function = 7
"""
ONLINE = ["--num_generations", 2, "--steps_per_generation", 1, "--num_iterations", 1, "--beta", 0]


def online(folder, reward, *flags, **more):
    (folder / "mine.py").write_text(REWARDS)
    (folder / "broken.py").write_text("import no_such_module\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    return attempt("grpo", folder, *ONLINE, "--reward", *reward.format(folder).split(), *flags, **more)


@pytest.mark.parametrize("reward, needles", (
    ("acuracy", ["--reward acuracy", "accuracy", "FILE.py:FUNCTION"]),
    ("{}/nowhere.py:fine", ["nowhere.py", "FILE.py:FUNCTION"]),
    ("{}/mine.py:nosuch", ["nosuch", "FILE.py:FUNCTION"]),
    ("{}/mine.py", ["mine.py", "FILE.py:FUNCTION"]),
    ("{}/mine.py:", ["mine.py", "FILE.py:FUNCTION"]),
    ("{}/mine.py:not_a_function", ["not_a_function"]),
    ("{}/broken.py:fine", ["broken.py", "no_such_module"]),
    ("{}/leaves.py:fine", ["leaves.py"]),
    ("{}/mine.py:short", ["mine.py:short", "list", "numbers"]),
    ("{}/mine.py:text", ["mine.py:text", "numbers"]),
    ("{}/mine.py:one_number", ["mine.py:one_number", "list"]),
    ("{}/mine.py:nothing", ["mine.py:nothing", "list"]),
    ("{}/mine.py:nested", ["mine.py:nested", "numbers"]),
    ("accuracy --reward_weights 1 2", ["--reward_weights", "2 values", "1 reward"]),
), ids=lambda x: x[3:] if isinstance(x, str) else "")  # fmt: skip
def test_rewards_that_are_none(reward, needles, tmp_path):
    refused(online(tmp_path, reward), tmp_path, *needles)


@pytest.mark.parametrize("function", ("nan", "infinite", "none", "raises", "leaves", "hangs", "other_columns",
                                      "stubborn"))  # fmt: skip
def test_rewards_that_never_answer(function, tmp_path):
    """A health error: no reward is not a reward of 0. Before step 1 where the function says so; a call that fails costs
    its rollout only, until the third."""
    result = online(tmp_path, f"{{}}/mine.py:{function}", "--reward_timeout", 1, "--max_steps", 9, limit=15)
    assert result.code == 3, result.err
    line = refused(result, tmp_path, "GRPO003", code=3)
    assert ("three rollouts in a row" in line) == (function not in ("nan", "infinite", "none"))


@pytest.mark.parametrize("function", ("fine", "greedy", "many_kinds"))
def test_rewards_that_are_fine(function, tmp_path):
    result = online(tmp_path, f"{{}}/mine.py:{function}", "--num_generations", 4, "--allow", "GRPO003", "GRPO001")
    assert result.code == 0, result.err


# ---- output and resume ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was stopped after step 2 of 4, with checkpoints 1 and 2: what must not be harmed."""
    folder = tmp_path_factory.mktemp("finished")

    def patch(module):
        save = module.save_or_stop

        def stop(run, step, *more):
            if step == 2:
                STOP["signal"] = signal.SIGTERM
            save(run, step, *more)

        module.save_or_stop = stop

    result = attempt("sft", folder, "--max_steps", 4, "--save_every", 1, patch=patch)
    assert result.code == 4, result.err
    return folder


@pytest.fixture
def earlier(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def resumes(folder):
    """The interrupted run still goes on to its end."""
    result = attempt("sft", folder, "--max_steps", 4, "--save_every", 1, "--resume", "auto")
    assert result.code == 0 and "resumed" in result.out, result.err
    steps = [json.loads(line)["step"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


CHANGED = {
    "another run": (["--resume", "never"], ["--output_dir", "--resume auto"]),
    "other flags": (["--learning_rate", 1e-3, "--seed", 3], ["learning_rate was", "seed was", "--allow_changes"]),
    "other data": (["--dataset", "mine"], ["data was", "--allow_changes"]),
    "no data": (["--dataset", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "no model": (["--model", "no/such-model", "--max_length", 200], ["--model"]),
    "broken template": (["--chat_template", "nowhere.jinja"], ["nowhere.jinja"]),
}


@pytest.mark.parametrize("case", CHANGED)
def test_an_earlier_checkpoint_stays_whole(case, earlier):
    flags, needles = CHANGED[case]
    flags = [write_rows(earlier, GOOD["sft"][0]) if flag == "mine" else flag for flag in flags]
    before = contents(earlier / "out")
    result = attempt("sft", earlier, "--max_steps", 4, "--save_every", 1, "--resume", "auto", *flags)
    assert result.code == 2 and "Traceback" not in result.err, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1 and all(needle in lines[0] for needle in needles), result.err
    after = contents(earlier / "out")
    for name in "run.json", "run.lock":  # who was here last, and how it ended
        assert after.pop(name) and before.pop(name)
    assert after == before
    if "never" in flags:
        assert after == before  # not even run.json: that one is the other run's
    resumes(earlier)


@pytest.mark.parametrize("what", ("out", "out/checkpoint-000009", "nowhere/checkpoint-000001", "rows.jsonl", "maybe"))
def test_resume_from_what_is_no_checkpoint(what, earlier):
    before = contents(earlier / "out")
    result = attempt("sft", earlier, "--max_steps", 4, "--save_every", 1, "--resume", earlier / what)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "--resume" in result.err, result.err
    assert contents(earlier / "out") == before


def test_resume_from_a_damaged_checkpoint(earlier):
    newest = earlier / "out" / "checkpoint-000002"
    (newest / "model.safetensors").write_bytes(b"x")
    flags = ["--max_steps", 4, "--save_every", 1]
    result = attempt("sft", earlier, *flags, "--resume", newest)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "whole" in result.err, result.err
    resumes(earlier)  # auto takes the one before


@pytest.mark.parametrize("name", ("run.json", "checkpoint-000002/trainer/meta.json"))
def test_resume_after_a_power_cut(name, earlier):
    """An empty file is what a crash of the machine leaves of one that was not synced."""
    (earlier / "out" / name).write_text("")
    resumes(earlier)


def test_resume_where_nothing_is(tmp_path):
    """auto means: if there is something."""
    result = attempt("sft", tmp_path, "--resume", "auto")
    assert result.code == 0, result.err


def test_files_of_others_in_the_output_folder_are_left_alone(tmp_path):
    """--output_dir may be the folder where the data lies."""
    (tmp_path / "out").mkdir()
    data = tiny_rows("sft", tmp_path / "out" / "rows.jsonl", 8)
    (tmp_path / "out" / "notes.jsonl").write_text("{}\n")
    others = {name: (tmp_path / "out" / name).read_bytes() for name in ("rows.jsonl", "notes.jsonl")}
    result = attempt("sft", tmp_path, "--dataset", data, "--save_every", 1)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in others} == others
    assert result.code == 0, result.err
    (tmp_path / "out" / "notes.jsonl").write_text("{}\n{}\n")  # went on while the run stood still
    result = attempt("sft", tmp_path, "--dataset", data, "--save_every", 1, "--resume", "auto")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "notes.jsonl").read_text() == "{}\n{}\n"


def test_the_default_folder_is_the_next_free_one(tmp_path):
    """A run that never began occupies none; one that crashed, was killed or left anything does."""
    for _ in range(2):
        result = leave("sft", "--dataset", write_rows(tmp_path, {"x": "y"}), patch=lambda module: os.chdir(tmp_path))
        assert result.code == 2 and len(result.err.splitlines()) == 1, result.err
    (first,) = (tmp_path / "runs").iterdir()
    assert first.name == "sft" and json.loads((first / "run.json").read_text())["exit_code"] == 2
    for number, exit_code in enumerate((1, 3, None, 0), 2):
        (tmp_path / "runs" / f"sft-{number}").mkdir()
        (tmp_path / "runs" / f"sft-{number}" / "run.json").write_text(json.dumps({"exit_code": exit_code}))
    (first / "checkpoint-000001").mkdir()
    leave("sft", "--dataset", write_rows(tmp_path, {"x": "y"}), patch=lambda module: os.chdir(tmp_path))
    assert len(list((tmp_path / "runs").iterdir())) == 6 and (tmp_path / "runs" / "sft-6").is_dir()


def test_the_same_command_again_after_exit_code_2(tmp_path):
    """The flag is corrected, the folder is the same, and nothing of the first run is in it."""
    result = attempt("sft", tmp_path, "--dataset", tmp_path / "nothing.jsonl")
    refused(result, tmp_path, "nothing.jsonl")
    result = attempt("sft", tmp_path, "--max_steps", 1)
    assert result.code == 0 and (tmp_path / "out" / "final").is_dir(), result.err
    assert "holds another run" in attempt("sft", tmp_path, "--max_steps", 1).err


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(attempt("sft", tmp_path, "--output_dir", tmp_path / "file" / "out"), tmp_path, "--output_dir", "file/out")
    refused(attempt("sft", tmp_path, "--output_dir", tmp_path / "file"), tmp_path, "--output_dir")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write to")
def test_output_that_cannot_be_written(tmp_path):
    out = "/proc/cleanpost/out"
    refused(attempt("sft", tmp_path, "--output_dir", out), tmp_path, f"--output_dir {out}")


def cap(size):
    """A full disk without root: files may not grow beyond `size` bytes, and say so instead of killing the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("name", ("sft", "grpo"))
def test_a_disk_that_is_full_from_the_start(name, tmp_path):
    result = attempt(name, tmp_path, patch=lambda module: cap(100_000))
    refused(result, tmp_path, "save", str(tmp_path / "out"))


def test_a_disk_that_fills_up_later(earlier):
    """Steps 3 and 4 cannot be saved: exit code 2, and what was saved before goes on."""

    def patch(module):
        write = checkpoint.write_checkpoint

        def full(run, step, *more):
            if step == 4:
                cap(100_000)
            write(run, step, *more)

        checkpoint.write_checkpoint = full

    result = attempt("sft", earlier, "--max_steps", 4, "--save_every", 1, "--resume", "auto", patch=patch)
    assert result.code == 2 and "Traceback" not in result.err, result.err
    assert [line[:7] for line in result.err.splitlines()] == ["error: "]
    names = sorted(path.name for path in (earlier / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-000002", "checkpoint-000003"] and not (earlier / "out" / "final").exists()
    assert json.loads((earlier / "out" / "run.json").read_text())["exit_code"] == 2
    resumes(earlier)
    assert not list((earlier / "out").glob(".tmp-*"))


@pytest.mark.parametrize("name", once("sft"))
def test_fewer_rows_than_ranks(name, tmp_path):
    for result in try_train(name, tmp_path / "out", "--batch_size", 1, "--max_steps", 1, world=2):
        assert result.code == 1 and result.error.startswith("InputError: --batch_size 1"), result.error
        assert "at least 2" in result.error


# ---- real processes ------------------------------------------------------------------------------


def children_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def process(folder, *command):
    """python methods/x.py ... as a user types it, away from the repository."""
    command = [sys.executable, str(ROOT / "methods" / command[0]), *map(str, command[1:])]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return SimpleNamespace(code=result.returncode, out=result.stdout, err=result.stderr)


@pytest.mark.parametrize("name", once("sft", "grpo"))
def test_processes_that_fail_on_a_flag(name, tmp_path):
    """Before the slow imports: in well under the three seconds of a core that torch alone takes."""
    before = children_seconds()
    result = process(tmp_path, f"{name}.py", "--learning_rate", "-1", "--output_dir", "out")
    assert children_seconds() - before < 3
    refused(result, tmp_path, "--learning_rate")
    assert not (tmp_path / "out").exists()


def test_a_process_that_fails_on_its_data(tmp_path):
    data = write_rows(tmp_path, {"question": "3+4=", "reply": "7"})
    result = process(tmp_path, "sft.py", "--dataset", data, "--output_dir", "out")
    refused(result, tmp_path, "'question', 'reply'", "prompt + completion", "--rename")


def test_a_process_that_fails_its_health_check(tmp_path):
    flags = ["--dataset", "tiny:test", "--max_length", 45, "--output_dir", "out"]
    refused(process(tmp_path, "dpo.py", *flags), tmp_path, "DATA005", code=3)
