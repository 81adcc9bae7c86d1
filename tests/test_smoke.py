"""Every script, as a user meets it: --help, three steps from the command line, the files they leave; and what no script
may contain. Parametrised over all scripts by globbing: a new one without its metric keys below fails."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FAST, METHODS, ROOT, SCRIPTS, STABLE, changes_the_run, once, script, tiny_flags, tiny_rows, train
from conftest import with_row
from safetensors import safe_open
from test_bad_input import children_seconds, leave
from test_resume import assert_equal, interrupted
from test_split import BATCH, BIG, HELDOUT, IN_FLOAT64, ROWS, differences
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer,
    GenerationConfig,
)  # fmt: skip

from common.runtime.flags import on_signal

PERF = ["perf/seconds", "perf/tokens_per_s", "perf/peak_gb"]
PAIR = ["loss", "reward_margin", "reward_acc", "reward_chosen", "reward_rejected", "chosen_logprob", "rejected_logprob"]
RANKED = ["loss", "accuracy", "reward_margin", "reward_chosen", "reward_rejected"]
RANKED += ["reward_mean", "reward_std", "reward_min", "reward_max"]
LABELLED = ["loss", "kl", "reward_chosen", "chosen_logprob", "reward_rejected", "rejected_logprob"]
METRICS = {  # of a training row and of an evaluation row, in their order: a contract, see design section 12
    "sft": (
        ["step", "loss", "num_tokens", "grad_norm", "lr", *PERF],
        ["step", "eval/loss", "eval/token_accuracy", "eval/accuracy"],
    ),
    "dpo": (
        ["step", *PAIR, "num_tokens", "grad_norm", "lr", *PERF],
        ["step", *(f"eval/{key}" for key in PAIR), "eval/accuracy"],
    ),
    "experimental/dpo_batch": (
        ["step", *PAIR, "num_tokens", "grad_norm", "lr", *PERF],
        ["step", *(f"eval/{key}" for key in PAIR), "eval/accuracy"],
    ),
    "experimental/tr_dpo": (
        ["step", *PAIR, "num_tokens", "grad_norm", "lr", *PERF],
        ["step", *(f"eval/{key}" for key in PAIR), "eval/accuracy"],
    ),
    "reward": (
        ["step", *RANKED, "num_tokens", "grad_norm", "lr", *PERF],
        ["step", *(f"eval/{key}" for key in RANKED)],
    ),
    "kto": (
        ["step", *LABELLED, "reward_margin", "num_tokens", "grad_norm", "lr", *PERF],
        ["step", *(f"eval/{key}" for key in (*LABELLED, "accuracy", "reward_margin"))],
    ),
    "grpo": (
        ["step", "loss", "num_tokens", "reward", "silent_frac", "no_reward_frac", "truncated_frac", "completion_len",
         "ratio_mean", "clip_frac", "kl", "entropy", "sampler_gap", "perf/rollout_seconds", "grad_norm", "lr", *PERF],
        ["step", "eval/accuracy", "eval/completion_len", "eval/no_reward_frac", "eval/pass@2"],
    ),
}  # fmt: skip
METRICS["rloo"] = METRICS["grpo"]
SHIFTED = ["loss", "delta", *LABELLED[2:]]
METRICS["experimental/bco"] = (
    ["step", *SHIFTED, "reward_margin", "num_tokens", "grad_norm", "lr", *PERF],
    ["step", *(f"eval/{key}" for key in (*SHIFTED, "accuracy", "reward_margin"))],
)
WITHOUT_REFERENCE = {"orpo": ["loss", "nll", "log_odds_ratio", *PAIR[1:]], "cpo": ["loss", "nll", *PAIR[1:]]}
WITHOUT_REFERENCE["tpo"] = WITHOUT_REFERENCE["cpo"]
for name, keys in WITHOUT_REFERENCE.items():
    training = ["step", *keys, "num_tokens", "grad_norm", "lr", *PERF]
    METRICS[f"experimental/{name}"] = training, ["step", *(f"eval/{key}" for key in keys), "eval/accuracy"]
METRICS |= {f"experimental/{name}": METRICS["sft"] for name in ("neftune", "sft_bema")}
JUDGED = ["loss", "accuracy", "right_frac"]
METRICS["experimental/prm"] = (
    ["step", *JUDGED, "num_tokens", "grad_norm", "lr", *PERF],
    ["step", *(f"eval/{key}" for key in JUDGED)],
)
METRICS["experimental/sft_moe"] = ["step", "loss", "aux_loss", *METRICS["sft"][0][2:]], METRICS["sft"][1]
PLAIN = [key for key in METRICS["grpo"][0] if key != "kl"], METRICS["grpo"][1]  # of runs without a reference
METRICS |= {f"experimental/{name}": PLAIN for name in ("grpo_sequence", "grpo_token", "dppo", "gdpo", "gfpo")}


KEPT = [key for key in PLAIN[0] if key not in ("ratio_mean", "clip_frac")]
KEPT[KEPT.index("entropy") : KEPT.index("entropy")] = ["kept_reward", "empty_frac"]
METRICS["experimental/raft"] = KEPT, PLAIN[1]


def more_keys(metrics, before, *keys):
    """Those of another script with further ones in front of one of them."""
    at = metrics[0].index(before)
    return [*metrics[0][:at], *keys, *metrics[0][at:]], metrics[1]


METRICS["experimental/dapo"] = more_keys(METRICS["grpo"], "ratio_mean", "num_prompts", "epoch")
METRICS["experimental/grpo_entropy"] = more_keys(PLAIN, "perf/rollout_seconds", "entropy_coef")
METRICS["distillation"] = (
    ["step", "loss", "num_tokens", "on_policy", "truncated_frac", "completion_len", "entropy", "sampler_gap",
     "perf/rollout_seconds", "grad_norm", "lr", *PERF],
    ["step", "eval/accuracy", "eval/completion_len", "eval/divergence"],
)  # fmt: skip
METRICS["experimental/iw_opd"] = more_keys(METRICS["distillation"], "entropy", "sampled_kl")
METRICS["experimental/gold"] = more_keys(METRICS["distillation"], "entropy", "num_spans", "lost_frac")
METRICS["experimental/ssd"] = (
    ["step", "loss", "num_tokens", "truncated_frac", "completion_len", "blank_frac", "entropy", "sampler_gap",
     "perf/rollout_seconds", "grad_norm", "lr", *PERF],
    ["step", "eval/accuracy", "eval/completion_len"],
)  # fmt: skip
METRICS["experimental/sdpo"] = (
    ["step", "loss", "num_tokens", "reward", "silent_frac", "no_reward_frac", "truncated_frac", "completion_len",
     "success_frac", "reprompted_frac", "entropy", "sampler_gap", "perf/rollout_seconds", "grad_norm", "lr", *PERF],
    ["step", "eval/accuracy", "eval/completion_len", "eval/no_reward_frac"],
)  # fmt: skip
SAMPLE = ["step", "row", "prompt", "completion", "reward", "advantage", "parts", "stop"]
NOT_JUDGED = [key for key in SAMPLE if key not in ("reward", "advantage", "parts")]  # a teacher is no reward
EXPORT = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
          "tokenizer_config.json"]  # fmt: skip
TRAINER = ["trainer/meta.json", "trainer/state.safetensors"]
EXTRA = {
    "dpo": ["ref_logprobs_heldout.safetensors", "ref_logprobs_train.safetensors"],
    "experimental/dpo_batch": ["ref_logprobs_heldout.safetensors", "ref_logprobs_train.safetensors"],
    "kto": ["ref_logprobs_heldout.safetensors", "ref_logprobs_train.safetensors"],
    "experimental/bco": ["ref_logprobs_heldout.safetensors", "ref_logprobs_train.safetensors"],
    **{name: ["samples.jsonl"] for name in METRICS if "perf/rollout_seconds" in METRICS[name][0]},
}
for name in set(SCRIPTS) - set(METRICS):  # a fork without rows of its own writes what its parent writes
    parent = with_row(METRICS, name)
    METRICS[name], EXTRA[name] = METRICS[parent], EXTRA.get(parent, [])
CLASSIFIERS = {"reward": (AutoModelForSequenceClassification, "score"),
               "experimental/prm": (AutoModelForTokenClassification, "score")}  # fmt: skip
RUN = set("status exit_code pid command flags versions git script_sha256 data before last best alerts".split())
RUN |= {"seconds", "save_seconds"}
SHARD = re.compile(r"checkpoint-\d{6}/trainer/shard-\d+-model-\d+-of-\d+\.safetensors")


def command(name, *flags):
    return [sys.executable, str(METHODS / f"{name}.py"), *map(str, flags)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, tmp_path):
    """In under three seconds of one core (the clock on the wall would measure the other tests), and without torch: a
    module that raises when it is imported stands in for it. The docstring is printed as it stands."""
    for heavy in "torch", "transformers", "datasets":
        (tmp_path / f"{heavy}.py").write_text(f"raise SystemExit('--help imports {heavy}')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    before = children_seconds()
    result = subprocess.run(command(name, "--help"), capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert children_seconds() - before < 3
    tree = ast.parse((METHODS / f"{name}.py").read_text())
    assert result.stdout.startswith(ast.get_docstring(tree, clean=False).strip() + "\n")
    flags = {f"--{flag.replace('_', '-')}" for flag in script(name).Args.__dataclass_fields__}
    assert flags <= set(re.findall(r"--[a-z0-9-]+", result.stdout))
    assert not (tmp_path / "runs").exists()


# ---- three steps ---------------------------------------------------------------------------------


def three_steps(name, folder):
    """Five rows a step in one micro-batch, and three held-out ones."""
    data = tiny_rows(name, folder / "rows.jsonl", ROWS)
    flags = ["--dataset", data, "--eval_dataset", f"tiny:test[:{HELDOUT}]", "--eval_every", 2, "--batch_size", BATCH]
    flags += ["--tokens_per_microbatch", BIG, "--max_steps", 3, "--save_every", 1, "--keep_last", 3]
    return [*flags, *two_rollouts(name)]


def two_rollouts(name):
    """Flags with which three steps of grpo's children are two of one rollout and one of the next."""
    has_rollouts = "steps_per_generation" in script(name).Args.__dataclass_fields__
    return ["--steps_per_generation", 1] if has_rollouts else []


@pytest.fixture(scope="module", params=SCRIPTS)
def ran(request, tmp_path_factory):
    """`python methods/x.py`: three steps, an evaluation after the second, three checkpoints, in an empty folder."""
    name, folder = request.param, tmp_path_factory.mktemp("smoke")
    flags = three_steps(name, folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    argv = command(name, *tiny_flags(name), *flags)
    if name == "sft" or request.config.getoption("--slow"):
        result = subprocess.run(argv, capture_output=True, text=True, cwd=folder, env=environment, timeout=180)
        assert (result.returncode, result.stderr) == (0, "")
        return name, folder / "runs" / name.rpartition("/")[2], result.stdout

    def as_typed(module):
        os.chdir(folder)
        sys.argv = argv[1:]

    result = leave(name, *argv[2:], patch=as_typed)  # in a fork, which saves the seconds of the imports
    assert (result.code, result.err) == (0, "")
    return name, folder / "runs" / name.rpartition("/")[2], result.out


def test_a_resumed_run_ends_alike(ran, tmp_path, request):
    """From the checkpoint of step 1, within a rollout, to the same bytes: what steps leave behind in the script's own
    variables is saved, or is not needed. Stable scripts are killed at every turn (test_resume)."""
    name, out, _ = ran
    if name in STABLE:
        pytest.skip("killed at every turn in test_resume")
    if not changes_the_run(name) and not request.config.getoption("--slow"):
        pytest.skip("--slow: its parent's main, byte for byte (test_copies)")
    again = interrupted(out, tmp_path / "run", 1)
    train(name, again, *three_steps(name, out.parents[1]), "--resume", "auto")
    assert_equal(again, out, steps=[2, 3])


def test_two_ranks_end_alike(ran, tmp_path):
    """On two ranks with every row a micro-batch of its own, by the measure of test_split, where stable scripts are cut
    in more ways, over more steps."""
    name, out, _ = ran
    if name in STABLE + IN_FLOAT64:
        pytest.skip("compared in test_split")
    flags = three_steps(name, out.parents[1])
    train(name, tmp_path / "run", *flags, "--tokens_per_microbatch", FAST[name]["micro"], world=2)
    wrong = differences(name, out, tmp_path / "run", two_rollouts(name))
    assert not wrong, "\n".join(wrong[:20])


def test_the_files_of_a_run(ran):
    """Exactly those of design section 9: nothing missing, nothing left over."""
    name, out, _ = ran
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    shards = {path for path in found if SHARD.fullmatch(path)}
    wanted = {"run.json", "run.lock", "metrics.jsonl", *EXTRA.get(name, [])}
    wanted |= {f"final/{file}" for file in [*EXPORT, "README.md"]}
    for step in 1, 2, 3:
        wanted |= {f"checkpoint-{step:06d}/{file}" for file in EXPORT + TRAINER}
    assert found - shards - {"alerts.jsonl"} == wanted
    assert len(shards) == 3
    assert not (out / "alerts.jsonl").is_file() or (out / "alerts.jsonl").read_text() == ""


def test_run_json(ran):
    name, out, stdout = ran
    known = json.loads((out / "run.json").read_text())
    assert RUN <= set(known)
    assert (known["status"], known["exit_code"], known["alerts"]) == ("finished", 0, {})
    assert set(known["flags"]) == set(script(name).Args.__dataclass_fields__)
    assert known["command"] in stdout and known["command"].startswith("python ")
    assert re.fullmatch("[0-9a-f]{64}", known["script_sha256"])
    assert re.fullmatch("[0-9a-f]{16}", str(known["data"]))  # the dataset's fingerprint
    assert known["best"] and set(known["last"]) == set(METRICS[name][1]) - {"step"}


def test_metric_keys(ran):
    """Stable, in their order, and each row a number under each key."""
    name, out, _ = ran
    rows = lines(out / "metrics.jsonl")
    train, held = METRICS[name]
    assert [list(row) for row in rows] == [held, train, train, held, train, held]
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 3]
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())


def test_every_script_has_its_metrics_listed():
    assert set(METRICS) == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_metric_keys_are_documented(name):
    text = (ROOT / "common" / "README.md").read_text()
    keys = {key.replace("@2", "@k") for row in METRICS[name] for key in row}
    assert sorted(key for key in keys if f"`{key}`" not in text) == []


def test_samples(ran):
    name, out, _ = ran
    if (out / "samples.jsonl").is_file():
        rows = lines(out / "samples.jsonl")
        keys = SAMPLE if "reward" in METRICS[name][0] else NOT_JUDGED
        assert rows and all(list(row) == keys and row["stop"] in ("stop", "length") for row in rows)
        assert {row["step"] for row in rows} <= {1, 2, 3}
    else:
        assert "samples.jsonl" not in EXTRA.get(name, [])


def test_the_console(ran):
    """The token picture, the plan, a line per step, before and after, and the two lines that load the result."""
    _, out, stdout = ran
    assert stdout.startswith("first row ") and "\ncommand " in stdout
    assert all(f"\nstep {step}  " in stdout for step in range(4))
    assert "->" in stdout and "from_pretrained(" in stdout
    assert "\x1b" not in stdout  # not a terminal: no colours, no bar


def test_final_loads_as_any_model(ran):
    name, out, _ = ran
    kind, head = CLASSIFIERS.get(name, (AutoModelForCausalLM, "model"))
    lm = kind.from_pretrained(out / "final", use_safetensors=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(out / "final", trust_remote_code=False)
    assert lm.dtype == torch.float32 and lm.config._attn_implementation != "flash_varlen"
    config = json.loads((out / "final" / "config.json").read_text())
    assert config["dtype"] == "float32" and not any("attn" in key for key in config)
    stops = GenerationConfig.from_pretrained(out / "final") if name in CLASSIFIERS else lm.generation_config
    stops = stops.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|end|>") in (stops if isinstance(stops, list) else [stops])
    with safe_open(out / "final" / "model.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"} and all(k.startswith(("model.", head)) for k in tensors.keys())
    assert "runs/" not in (out / "final" / "README.md").read_text().split("`")[0]
    messages = [{"role": "user", "content": "What is 123 + 456?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    if name == "reward":
        assert lm(ids).logits.shape == (1, 1)
    elif name == "experimental/prm":
        assert lm(ids).logits.shape == (1, ids.shape[1], 2)
    else:
        assert lm.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", once("sft", "grpo"))
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM), ids=("INT", "TERM"))
def test_a_signal_stops_after_saving(name, number, tmp_path):
    """During step 1: the run finishes it, saves, says how to go on and leaves with 4. The handler is what the script
    installs when it is started as a program."""
    out = tmp_path / "out"

    def patch(module):
        signal.signal(number, on_signal)
        clip_grad_norm = module.clip_grad_norm

        def during(*given):
            os.kill(os.getpid(), number)
            return clip_grad_norm(*given)

        module.clip_grad_norm = during

    data = tiny_rows(name, tmp_path / "rows.jsonl", 8)
    flags = ["--dataset", data, "--eval_dataset", "", "--batch_size", 2, "--max_steps", 3, "--output_dir", out]
    result = leave(name, *tiny_flags(name), *flags, patch=patch)
    assert result.code == 4, result.err
    heard, saved = result.err.splitlines()
    assert heard.startswith(f"{number.name} was heard: the run saves where this step ends")
    assert saved.startswith("stopped and saved after step 1") and "--resume auto" in saved
    known = json.loads((out / "run.json").read_text())
    assert (known["status"], known["exit_code"]) == ("stopped", 4)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-000001"] and not (out / "final").exists()


def test_ctrl_c_in_a_terminal(tmp_path):
    """The real process, interrupted in its first step; a second Ctrl-C leaves at once."""
    for signals, code in (1, 4), (2, 130):
        out = tmp_path / str(code)
        flags = ["--max_steps", 500, "--eval_dataset", "", "--output_dir", out, "--batch_size", 128]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command("sft", *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env=environment, cwd=tmp_path)  # fmt: skip
        try:
            end = time.monotonic() + 60
            while not (out / "metrics.jsonl").is_file() and time.monotonic() < end:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            while signals == 2 and process.poll() is None:  # two that arrive during one long operation are seen as one
                time.sleep(0.1)
                process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=60)[1]
        finally:
            process.kill()
        assert process.returncode == code, err
        assert "Traceback" not in err


# ---- source --------------------------------------------------------------------------------------

FORBIDDEN = {
    r"pad_id|pad_token_id\s*[!=]=": "a mask from a token id",
    r"torch\.load|pickle|joblib|np\.load": "pickle executes what it reads",
    r"except\s*:": "a bare except",
    r"\b(TODO|FIXME|XXX|HACK)\b": "unfinished",
    r"trust_remote_code\s*=\s*True": "code from a model folder",
    r"torch\.(float16|half)\b|\.half\(\)": "sums in half precision",
    r"\b(requests|urllib|http\.client|socket)\b": "network of its own",
    r"\beval\((?!\))|\bexec\(|os\.system|shell=True": "text that is run",
}


def sources():
    folders = "common", "common/runtime", "common/experimental"
    shared = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    return [*METHODS.rglob("*.py"), *shared]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)
def test_what_no_source_may_contain(path):
    text = path.read_text()
    assert text.isascii()
    for pattern, why in FORBIDDEN.items():
        if why == "network of its own" and path.stem == "reward_files":
            continue  # a pair of sockets is how it talks to its child
        allowed = "bfloat16" if "float16" in pattern else None
        found = [line for line in text.splitlines() if re.search(pattern, line.replace(allowed or "\0", ""))]
        assert not found, (why, found)


def calls(path, attribute):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute:
            yield node, {keyword.arg: keyword.value for keyword in node.keywords}


def test_everything_is_loaded_from_safetensors_and_runs_no_code():
    """from_pretrained of a folder that we have just written (check_export) may do without trust_remote_code."""
    models = 0
    for path in sources():
        for node, given in calls(path, "from_pretrained"):
            what, where = ast.unparse(node.func), f"{path.name}:{node.lineno}"
            # By name, so that the next lines see it; a policy's auto_class is AutoModelFor...
            assert what.startswith(("Auto", "GenerationConfig", "policy.auto_class", "policy_class.auto_class")), where
            if what.startswith("Generation"):
                continue
            assert "trust_remote_code" in given and ast.literal_eval(given["trust_remote_code"]) is False, where
            if "Model" in what or "auto_class" in what:
                models += 1
                assert ast.literal_eval(given["use_safetensors"]) is True, where
    assert models >= 3  # the fallback of loading, the check of what was saved, reward models


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_runs_nothing(name, tmp_path):
    """No flags parsed, no handlers installed, no files: forks and tests import."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    script(name)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert script(name).args is None


# ---- python -O and -OO -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_python(tmp_path_factory):
    """`python -OO methods/x.py`: no asserts and no docstrings. Bytecode is kept: compiling torch takes ten seconds."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(name, *flags):
        argv = [sys.executable, "-OO", METHODS / f"{name}.py", *flags]
        return subprocess.run([*map(str, argv)], capture_output=True, text=True, cwd=ROOT, env=environment)

    return run


def test_help_without_docstrings(run_python):
    """-OO removes them: --help has only the flags to show."""
    shown = run_python("sft", "--help")
    assert shown.returncode == 0 and "--learning-rate" in shown.stdout.replace("_", "-"), shown.stderr


@pytest.mark.slow
def test_without_docstrings(run_python, tmp_path):
    """transformers stops at a class that has none, so ours are written where -OO cannot remove them."""
    flags = [*tiny_flags("sft"), "--dataset", tiny_rows("sft", tmp_path / "rows.jsonl", 8), "--eval_rows", 2]
    done = run_python("sft", *flags, "--max_steps", 2, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_nothing_is_guarded_by_an_assert():
    """-O removes asserts."""
    for path in [*METHODS.rglob("*.py"), *(ROOT / "common").rglob("*.py")]:
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), path


@pytest.mark.slow
def test_a_language_model_is_no_reward_model_under_o(run_python, tmp_path):
    """What guards must be there where asserts are gone."""
    model = ROOT / "common" / "tiny" / "model"
    done = run_python("grpo", "--reward", model, "--max_steps", 1, "--output_dir", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert f"error: --reward {model}: it is no sequence classifier with one label" in done.stderr
