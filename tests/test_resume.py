"""A run that is killed, stopped or moved ends with the bytes of one that was not.

Equal means, against an undisturbed run of the same command: every tensor of every trainer/ folder bitwise, and
metrics.jsonl (without perf/), samples.jsonl and alerts.jsonl line by line. No tolerance anywhere but where a run goes
on with another number of ranks, which has test_split's.

Eight steps, a checkpoint every three: grpo's rollouts span four steps, so that both fall inside a rollout.
"""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import LOOPS, ROOT, STABLE, TIMEOUT, command, ended, newest, once, read_jsonl, script, tiny_flags
from conftest import tiny_rows, train, trainer_tensors, try_ranks, try_train
from safetensors.torch import load_file
from test_split import metric_differences, weight_differences
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification,
    AutoTokenizer, GenerationConfig,
)  # fmt: skip

from common.rewards import BUILT_IN
from common.runtime.launch import launch

STEPS, BATCH, KEPT = 8, 4, (3, 6, 8)
WEIGHTS = "model.policy.lm."  # how the names of the policy's weights begin in trainer/
AVERAGE = "model.average.lm."  # of sft_bema, which exports the average of its policies


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name, world -> (flags, folder of the undisturbed run), made once."""
    made = {}

    def undisturbed(name, world=1):
        if (name, world) not in made:
            folder = tmp_path_factory.mktemp(name.replace("/", "_"))
            lines = (ROOT / "common" / "tiny" / "test.jsonl").read_text().splitlines(keepends=True)
            (folder / "heldout.jsonl").write_text("".join(lines[:2]))
            flags = ["--dataset", tiny_rows(name, folder / "rows.jsonl", 12), "--max_steps", STEPS]
            flags += ["--eval_dataset", folder / "heldout.jsonl", "--eval_every", 4, "--batch_size", BATCH]
            flags += ["--save_every", 3, "--keep_last", 99, "--save_dtype", "float32"]
            if "reward" in script(name).Args.__dataclass_fields__:  # sums that no fp32 number is: a cast would show
                flags += ["--reward", "accuracy", "format", "--reward_weights", "0.7", "0.1"]
            train(name, folder / "whole", *flags, world=world)
            made[name, world] = flags, folder / "whole"
        return made[name, world]

    return undisturbed


def hashes(checkpoint):
    """sha256 of every tensor that training needs back, and of the state's."""
    tensors = trainer_tensors(checkpoint) | load_file(checkpoint / "trainer" / "state.safetensors")
    about = {name: f"{tensor.dtype} {tuple(tensor.shape)} ".encode() for name, tensor in tensors.items()}
    return {k: hashlib.sha256(about[k] + v.contiguous().numpy().tobytes()).hexdigest() for k, v in tensors.items()}


def meta(checkpoint):
    return json.loads((checkpoint / "trainer" / "meta.json").read_text())


def assert_equal(out, reference, steps=KEPT):
    for step in steps:
        a, b = (hashes(folder / f"checkpoint-{step:06d}") for folder in (out, reference))
        assert len(a) > 30 and a.keys() == b.keys()
        wrong = [k for k in a if a[k] != b[k]]
        assert not wrong, f"checkpoint-{step:06d}: {len(wrong)} of {len(a)} tensors differ, {wrong[0]} for one"
        a, b = (meta(folder / f"checkpoint-{step:06d}") for folder in (out, reference))
        assert a["state"] == b["state"] and a["step"] == b["step"] == step  # alert counters, streaks, the best so far
    for name in ("metrics.jsonl", "samples.jsonl", "alerts.jsonl"):
        ours, theirs = read_jsonl(out / name), read_jsonl(reference / name)
        assert len(ours) == len(theirs), f"{name}: {len(ours)} lines, {len(theirs)} in the undisturbed run"
        assert ours == theirs, next(f"{name}: {a} {b}" for a, b in zip(ours, theirs) if a != b)
    assert not [*out.glob(".*")], "leftovers"
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def interrupted(reference, out, last):
    """A folder as a kill leaves it some time after the checkpoint of step `last`."""
    shutil.copytree(reference, out)
    shutil.rmtree(out / "final")
    for folder in [p for p in out.glob("checkpoint-*") if int(p.name[-6:]) > last]:
        shutil.rmtree(folder)
    return out


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_loss(step, victim=0):
    """Kill in the forward pass of optimizer step `step` of this process: each has one micro-batch."""

    def patch(module):
        name, calls = f"{Path(module.__file__).stem}_loss", []
        loss = getattr(module, name)

        def counted(*args, **kwargs):
            calls.extend([1] * torch.is_grad_enabled())  # an evaluation has none
            if len(calls) == step and dist.get_rank() == victim:
                die()
            return loss(*args, **kwargs)

        setattr(module, name, counted)

    return patch


def at_event(event, *parts):
    """Kill at the first file-system event of this kind on a path that holds all parts."""

    def patch(_module):
        def hook(happened, args):
            if happened == event and args and all(part in str(args[0]) for part in parts):
                die()

        sys.addaudithook(hook)

    return patch


def in_reward(number):
    """Kill inside rollout `number` of this process, when its completions are there and their rewards are not."""

    def patch(_module):
        accuracy, calls = BUILT_IN["accuracy"], []

        def counted(prompts, completions, **columns):
            calls.extend([1] * (len(completions) == BATCH * 2 * 4))  # an evaluation has fewer
            if len(calls) == number:
                die()
            return accuracy(prompts, completions, **columns)

        BUILT_IN["accuracy"] = counted

    return patch


CHAINS = {  # kills of one run, one after the other; the counts are from the start of each process
    "steps": [in_loss(2), in_loss(5), in_loss(1), in_loss(4)],  # before any save; 5; 4 again at once; 7
    "saves": [
        at_event("open", ".tmp-rehearsal", "model"),  # the practice save
        at_event("open", ".tmp-checkpoint", "meta.json"),  # all but the marker
        at_event("os.rename", ".tmp-checkpoint"),  # whole, under the wrong name
        in_loss(2),
        at_event("os.rename", ".tmp-final"),  # at the very end
    ],
    "rollouts": [in_reward(1), in_reward(2)],
}


USUAL = {("sft", "saves"), ("grpo", "saves"), ("grpo", "rollouts"), ("experimental/dapo", "rollouts")}


def chains():
    """Stable scripts, killed in their steps; the other chains are about what is shared."""
    for name in LOOPS:
        for chain in CHAINS:
            if chain == "rollouts" and "reward" not in script(name).Args.__dataclass_fields__:
                continue
            usual = (name in STABLE and chain == "steps") or (name, chain) in USUAL
            yield pytest.param(name, chain, marks=[] if usual else [pytest.mark.slow])


@pytest.mark.parametrize("name, chain", list(chains()))
def test_killed(name, chain, runs, tmp_path):
    flags, whole = runs(name)
    for i, patch in enumerate(CHAINS[chain]):
        (result,) = try_train(name, tmp_path / "run", *flags, "--resume", "auto", patch=patch)
        assert result.code == -signal.SIGKILL, f"kill {i} did not happen: {result.log[-2000:]}"
    train(name, tmp_path / "run", *flags, "--resume", "auto")
    assert_equal(tmp_path / "run", whole)


@pytest.mark.parametrize("name", once("sft"))
def test_one_of_two_ranks_killed(name, runs, tmp_path):
    """The other rank cannot go on and says so; both together end with the bytes of two that were left alone."""
    flags, whole = runs(name, 2)
    results = try_train(name, tmp_path / "run", *flags, world=2, patch=in_loss(5, victim=1))
    assert results[1].code == -signal.SIGKILL and results[0].code != 0
    train(name, tmp_path / "run", *flags, "--resume", "auto", world=2)
    assert_equal(tmp_path / "run", whole)


@pytest.mark.parametrize("name", once("sft", "grpo", "experimental/dapo"))  # dapo's rollouts choose their prompts
def test_other_number_of_ranks(name, runs, tmp_path):
    """From one rank to two in the middle (grpo: of a rollout): equal as if the step were cut otherwise, test_split."""
    flags, whole = runs(name)
    out = interrupted(whole, tmp_path / "run", 3)
    train(name, out, *flags, "--resume", "auto", world=2)
    wrong = metric_differences(*(read_jsonl(folder / "metrics.jsonl") for folder in (whole, out)), name=name)
    wrong += weight_differences(newest(whole), newest(out), script(name).parse_args(tiny_flags(name)).learning_rate)
    assert not wrong and read_jsonl(out / "samples.jsonl")[:32] == read_jsonl(whole / "samples.jsonl")[:32], wrong
    assert meta(newest(out))["versions"]["mesh"] == "1x2x1"


# ---- SIGTERM ---------------------------------------------------------------------------------------------------------


def when_it_trains(out, process_alive):
    """Wait until the first step is logged."""
    end = time.monotonic() + TIMEOUT
    while not any("grad_norm" in line for line in read_complete(out / "metrics.jsonl")):
        assert process_alive() and time.monotonic() < end
        time.sleep(0.002)


def read_complete(path):
    """Whole lines of a file that is being written."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def stopped(out):
    ended, step = json.loads((out / "run.json").read_text()), int(newest(out).name[-6:])
    assert (ended["status"], ended["exit_code"]) == ("stopped", 4)
    assert 1 <= step < STEPS and step == read_jsonl(out / "metrics.jsonl")[-1]["step"], "saved and logged other steps"


@pytest.mark.parametrize("name", once("grpo"))
def test_sigterm(name, runs, tmp_path):
    flags, whole = runs(name)
    out = tmp_path / "run"
    worker = command(name, out, *flags)
    when_it_trains(out, worker.is_alive)
    os.kill(worker.pid, signal.SIGTERM)
    code, text = ended(worker)
    assert code == 4, text[-2000:]
    stopped(out)
    code, text = ended(command(name, out, *flags, "--resume", "auto"))
    assert code == 0, text[-2000:]
    assert json.loads((out / "run.json").read_text())["exit_code"] == 0
    assert_equal(out, whole)


def test_sigterm_to_a_command(runs, tmp_path):
    """The same with nothing forked: the command of the README. Stopped during its slow imports it leaves at once, for
    there is nothing to save; stopped when it trains it saves."""
    name, out = "sft", tmp_path / "run"
    flags, whole = runs(name)
    words = [sys.executable, ROOT / "methods" / f"{name}.py", *tiny_flags(name), "--output_dir", out, *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen([*map(str, words)], **options)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.05)  # the handler stands before torch is imported, and the first step is far away
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=TIMEOUT)[0].decode()
    assert process.returncode == 4 and text.startswith("SIGTERM was heard: there is nothing to save"), text[-2000:]
    assert not out.exists()
    process = subprocess.Popen([*map(str, words)], **options)
    when_it_trains(out, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=TIMEOUT)[0].decode()
    assert process.returncode == 4 and "SIGTERM was heard: the run saves" in text, text[-2000:]
    stopped(out)
    train(name, out, *flags, "--resume", "auto")
    assert_equal(out, whole)


def interrupted_in(rank, world, stage, argv):
    """Ctrl-C in one function of the script, which then would take a minute."""
    module = script("dpo")

    def slow(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    setattr(module, stage, slow)
    launch(module.main, module.parse_args(argv), module.__file__)


@pytest.mark.parametrize("stage", ("load_model", "load_groups", "load_weights", "attach_reference", "evaluate"))
def test_ctrl_c_before_step_1(stage, runs, tmp_path):
    """One line at once, exit code 4, and the folder is free for the same command."""
    flags, _ = runs("dpo")
    argv = [*tiny_flags("dpo"), *map(str, flags), "--output_dir", str(tmp_path / "run")]
    begun = time.monotonic()
    (result,) = try_ranks(1, interrupted_in, stage, argv)
    assert result.code == 4 and time.monotonic() - begun < 30
    assert result.log.count("SIGINT was heard: there is nothing to save yet") == 1 and "Traceback" not in result.log
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (about["status"], about["exit_code"]) == ("stopped", 4)
    code, text = ended(command("dpo", tmp_path / "run", *flags))
    assert code == 0, text[-2000:]


@pytest.mark.parametrize("name", once("sft", "dpo", "kto", "grpo"))
def test_max_steps_0_shows_the_plan(name, tmp_path):
    flags = ["--dataset", tiny_rows(name, tmp_path / "rows.jsonl", 6), "--batch_size", 2, "--eval_dataset", ""]
    code, text = ended(command(name, tmp_path / "run", *flags, "--max_steps", 0))
    assert code == 0 and text.count("first row") == 3 and "\ncommand   " in text, text[-2000:]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left <= {"run.json", "run.lock", "alerts.jsonl"}, left
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (about["status"], about["exit_code"]) == ("planned", 0)
    code, text = ended(command(name, tmp_path / "run", *flags, "--max_steps", 1))
    assert code == 0, text[-2000:]


def test_the_tracker_goes_on_in_the_same_run(runs, tmp_path):
    """The id is the folder's: a resumed run hands it over, another run has another."""
    flags, whole = runs("sft")

    def fake(_module):
        made = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
        made.init = lambda **given: print("INIT", json.dumps([given["id"], given["resume"]]))
        sys.modules["wandb"] = made

    ids = []
    for out, more in ("a", []), ("a", ["--resume", "auto", "--max_steps", 9, "--allow_changes"]), ("b", []):
        (result,) = try_train("sft", tmp_path / out, *flags, "--report_to", "wandb", *more, patch=fake)
        (line,) = [line for line in result.log.splitlines() if line.startswith("INIT")]
        ids.append(json.loads(line[5:]))
    assert ids[0] == ids[1] != ids[2] and ids[0][1] == "allow"


def test_another_batch_size_says_where_it_goes_on(runs, tmp_path):
    flags, whole = runs("sft")
    out = interrupted(whole, tmp_path / "run", 3)
    code, text = ended(command("sft", out, *flags, "--resume", "auto", "--allow_changes", "--batch_size", 2))
    assert code == 0 and "3 steps of --batch_size 4 read 12 rows, step 4 goes on at row 6 " in text, text[-2000:]


def test_another_batch_size_within_a_rollout_is_refused(runs, tmp_path):
    """The prompts of a rollout follow from the batch size: others would be paired with its completions."""
    flags, whole = runs("grpo")
    out = interrupted(whole, tmp_path / "run", 6)
    code, text = ended(command("grpo", out, *flags, "--resume", "auto", "--allow_changes", "--batch_size", 2))
    assert code == 2 and "within a rollout" in text and "batch_size" in text, text[-2000:]


# ---- what may be resumed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", once("sft"))
def test_refused(name, runs, tmp_path):
    """Another flag, other rows, another model: one line, exit code 2, and the folder as it was."""
    flags, whole = runs(name)
    out = interrupted(whole, tmp_path / "run", 6)
    (tmp_path / "other").mkdir()
    shutil.copytree(ROOT / "common" / "tiny" / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    changes = {  # what the line must name -> flags
        "seed": ["--seed", "7"],
        "learning_rate": ["--learning_rate", "0.5"],
        "data": ["--dataset", tiny_rows(name, tmp_path / "other" / "rows.jsonl", 12, start=50)],
        "model": ["--model", tmp_path / "model", "--max_length", 256],  # tiny's presets need not apply
    }
    before = {p: p.read_bytes() for p in [*out.glob("*.jsonl"), *out.rglob("*.safetensors")]}
    for what, change in changes.items():
        code, text = ended(command(name, out, *flags, "--resume", "auto", *change))
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and what in errors[0] and "--allow_changes" in errors[0], text[-2000:]
        assert "Traceback" not in text
    code, text = ended(command(name, out, *flags))
    assert code == 2 and "--resume auto" in text, text  # never a second run into the folder of a first
    assert all(path.read_bytes() == data for path, data in before.items())
    code, text = ended(command(name, out, *flags, "--resume", "auto", "--allow_changes", *changes["model"]))
    assert code == 2 and "does not fit" in text and "Traceback" not in text  # allowed is not possible
    code, text = ended(command(name, out, *flags, "--resume", "auto", "--allow_changes", *changes["seed"]))
    assert code == 0 and [line["step"] for line in read_jsonl(out / "metrics.jsonl")][-1] == STEPS, text[-2000:]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "flipped weight": lambda folder: flip(next(folder.glob("trainer/shard*.safetensors"))),
    "flipped export": lambda folder: flip(folder / "model.safetensors"),
    "missing file": lambda folder: (folder / "config.json").unlink(),
    "half of meta.json": lambda folder: cut(folder / "trainer" / "meta.json"),
    "no meta.json": lambda folder: (folder / "trainer" / "meta.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", once("dpo"))
def test_damaged_checkpoint_is_skipped(name, damage, runs, tmp_path):
    """The newest whole checkpoint wins; the damaged one is named, and replaced on the way."""
    flags, whole = runs(name)
    out = interrupted(whole, tmp_path / "run", 6)
    DAMAGE[damage](out / "checkpoint-000006")
    code, text = ended(command(name, out, *flags, "--resume", "auto"))
    assert code == 0 and "checkpoint-000003" in text and "Traceback" not in text, text[-2000:]
    assert_equal(out, whole)
    assert "checkpoint-000006" in text, "the damaged checkpoint was skipped without a word"
    again = interrupted(whole, tmp_path / "again", 6)
    DAMAGE[damage](again / "checkpoint-000006")
    code, text = ended(command(name, again, *flags, "--resume", again / "checkpoint-000006"))
    assert code == 2 and "checkpoint-000006" in text and "Traceback" not in text, text[-2000:]


@pytest.mark.parametrize("name", once("sft"))
def test_leftovers_are_cleaned(name, runs, tmp_path):
    """What a kill leaves under a passing name goes at the next start: folders, and files too."""
    flags, whole = runs(name)
    out = interrupted(whole, tmp_path / "run", 6)
    for leftover in (".tmp-checkpoint", ".tmp-rehearsal", ".tmp-final", ".old-checkpoint-000002"):
        shutil.copytree(out / "checkpoint-000003", out / leftover)
    (out / ".tmp-logprobs").write_bytes(b"half")
    (out / ".run.json").write_text("{")
    code, text = ended(command(name, out, *flags, "--resume", "auto"))
    assert code == 0, text[-2000:]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert_equal(out, whole)


# ---- what is saved ---------------------------------------------------------------------------------------------------


def assert_export(folder, checkpoint, dtype, tied):
    """A Hugging Face folder says what the trainer's weights say, in `dtype`."""
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".jinja", ".md", ".txt"}
    kind = AutoModelForCausalLM
    for auto_class in AutoModelForSequenceClassification, AutoModelForTokenClassification:
        if AutoConfig.from_pretrained(folder).architectures[0].endswith(auto_class.__name__.removeprefix("AutoModel")):
            kind = auto_class
    classifier = kind != AutoModelForCausalLM
    lm, info = kind.from_pretrained(folder, output_loading_info=True)
    assert lm.dtype == dtype == AutoConfig.from_pretrained(folder).dtype
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert classifier or (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    tensors = trainer_tensors(checkpoint)
    prefix = AVERAGE if any(key.startswith(AVERAGE) for key in tensors) else WEIGHTS
    trained = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    assert len(trained) == len(dict(lm.named_parameters())), "a tied alias appears once"
    for name, weight in lm.named_parameters():
        assert torch.equal(weight, trained[name].to(dtype)), name
    moved = kind.from_pretrained(folder, dtype=torch.float32)
    fresh = kind.from_config(lm.config, dtype=torch.float32).eval()
    fresh.load_state_dict({k: v.to(dtype).float() for k, v in trained.items()}, strict=classifier or not tied)
    ids = torch.arange(3, 40)[None]
    if classifier:  # a product with one column adds up as its operand lies in memory, which is the file for one of them
        moved, fresh = moved.base_model, fresh.base_model
    assert torch.equal(moved(ids)[0], fresh(ids)[0])  # the very same numbers through the very same code
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    end = tokenizer.apply_chat_template(turn, return_dict=False)[-1]
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    assert end in torch.tensor(stops).flatten().tolist() and end == tokenizer.eos_token_id


@pytest.mark.parametrize("name", once(*STABLE))
def test_saved_model(name, runs):
    flags, whole = runs(name)
    for folder in (whole / "final", whole / "checkpoint-000008"):
        assert_export(folder, whole / "checkpoint-000008", torch.float32, tied=True)
    tiny = AutoModelForCausalLM.from_pretrained(ROOT / "common" / "tiny" / "model", dtype=torch.float32)
    trained = trainer_tensors(whole / "checkpoint-000008")[f"{WEIGHTS}model.norm.weight"]
    assert not torch.equal(trained, tiny.model.norm.weight)  # or all of this would hold for a run that did nothing


@pytest.mark.parametrize("tied, dtype, world", [(True, "bfloat16", 1), (False, "float32", 2)])
@pytest.mark.parametrize("name", once("dpo"))
def test_saved_model_of_another_kind(name, tied, dtype, world, runs, tmp_path):
    """bf16 weights are the cast of the fp32 ones; an untied head is a matrix of its own; two ranks save one model."""
    source = ROOT / "common" / "tiny" / "model"
    shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("model.safetensors"))
    config = AutoConfig.from_pretrained(source, tie_word_embeddings=tied, num_hidden_layers=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    flags, _ = runs(name)
    flags = [*flags, "--model", tmp_path / "model", "--save_dtype", dtype, "--max_steps", 2]
    flags += ["--max_completion_length", 8, "--allow", "GRPO002"] if name == "grpo" else []
    train(name, tmp_path / "run", *flags, world=world)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert_export(tmp_path / "run" / "final", newest(tmp_path / "run"), expected, tied)
