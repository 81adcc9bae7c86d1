"""What the tests share: every script by globbing, a table of fast flags, forked gloo ranks, and how to read a run.

Scripts are used as their users use them: the command line, `parse_args`, `main`, and the files that a run leaves. Each
training run lives in a forked child, so that a kill, a signal or a patched function touches nobody else.

What is shared is tested on one script, or on those that could differ; `--slow` takes all of them. It adds: kills and
saved models of experimental scripts, resumes of those that leave main and the rollout to their parent, ten steps
instead of three in their splits, other ways to cut a step, every mesh with every model, every numeric flag of every
script, smoke runs as processes, signals, leftovers and refusals on every script, the second half of the hostile cases,
all of the GPU benchmark's cases, python -OO, and whole forks.
"""
import contextlib
import gc
import importlib.util
import io
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

# Before torch looks for it: the tests are about the CPU, and a GPU would not survive their forks. --gpu runs those of
# tests/gpu/ instead. xdist's workers see the variable, not the flag.
if "--gpu" in sys.argv:
    os.environ["CLEANPOST_GPU_TESTS"] = "1"
if "CLEANPOST_GPU_TESTS" in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    collect_ignore = ["gpu"]

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from test_copies import load
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.runtime.launch import setup

torch.set_num_threads(1)  # two cores are shared by up to four ranks, and a fork does not survive an OpenMP pool
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# No test cuts the power: what is synced, and when, test_faults looks at; waiting for the disk would test the disk.
os.fsync = lambda descriptor: None

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / "methods"
SCRIPTS = sorted(str(p.relative_to(METHODS).with_suffix("")) for p in METHODS.rglob("*.py"))  # sft, experimental/ppo
PARSED = load(ROOT)  # once: reading all scripts for each of them took longer than most tests
TIMEOUT = 60  # seconds a harness call may take: the longest takes about ten, so more is a hang


def delta_blocks(own):
    """The blocks that a script's Delta names."""
    return [own.canon(block) for names, _ in own.delta for block in names.split(", ")]


def changes_the_loop(name):
    """Does a script's Delta name anything but its flags and what stands under the banner `loss`?"""
    own = PARSED[f"methods/{name}.py"]
    others = [b for b in delta_blocks(own) if b != "Args.method" and own.banner_of.get(b) != "loss"]
    return own.parent == "none" or bool(others)


def changes_the_run(name):
    """Does a script's Delta name a part of main, or what fills a rollout?"""
    own = PARSED[f"methods/{name}.py"]
    return own.parent == "none" or any(b == "rollout" or b.startswith("main.") for b in delta_blocks(own))


# Where only flags and loss differ, the loop is the parent's byte for byte (test_copies): one cut of a step and the
# smoke test show that the loss fits it; the other cases would only test the parent again.
LOOPS = [name for name in SCRIPTS if changes_the_loop(name)]
STABLE = [name for name in SCRIPTS if "/" not in name]  # for what is the same text in all (test_copies), and slow

# Per script: the file of common/tiny that it reads, and flags with which a step takes a tenth of a second and still
# visits every branch that splits, saves or resumes (grpo: two optimizer steps from each of two prompts' halves of a
# rollout, twice; a reference). `micro`: a token budget so small that every row, and half of every group, stands alone.
ONLINE = ["--learning_rate", "5e-5", "--num_generations", "4", "--steps_per_generation", "2", "--num_iterations", "2",
          "--max_completion_length", "40", "--eval_samples", "2", "--temperature", "1.2"]  # fmt: skip
FAST = {
    "sft": {"data": "demonstrations", "micro": 60, "flags": ["--learning_rate", "1e-4"]},
    "experimental/neftune": {"data": "demonstrations", "micro": 60, "flags": ["--learning_rate", "2e-4"]},
    # dense, so without its loss, which test_sft_losses trains with; smoothing is on a road of its own
    "experimental/sft_moe": {"data": "demonstrations", "micro": 60, "flags": [
        "--learning_rate", "1e-4", "--label_smoothing_factor", "0.1"]},
    "experimental/sft_bema": {"data": "demonstrations", "micro": 60, "flags": [
        "--learning_rate", "1e-4", "--update_freq", "1", "--update_after", "1", "--loss_type", "dft"]},
    "dpo": {"data": "pairs", "micro": 90, "flags": ["--learning_rate", "8e-5"]},
    "experimental/dpo_batch": {"data": "pairs", "micro": 90, "flags": [
        "--learning_rate", "8e-5", "--loss_type", "aot", "bco_pair", "sft", "--loss_weights", "1", "0.5", "0.1"]},
    "experimental/tr_dpo": {"data": "pairs", "micro": 90, "flags": [
        "--learning_rate", "8e-5", "--ref_model_sync_steps", "2", "--bema", "--bias_power", "1", "--beta", "0.5"]},
    "experimental/orpo": {"data": "pairs", "micro": 90, "flags": ["--learning_rate", "8e-5", "--beta", "0.5"]},
    "experimental/cpo": {"data": "pairs", "micro": 90, "flags": [
        "--learning_rate", "8e-5", "--loss_type", "simpo", "--beta", "5", "--cpo_alpha", "1"]},
    "experimental/tpo": {"data": "triples", "micro": 90, "flags": [
        "--learning_rate", "8e-5", "--loss_type", "tpo-l", "--beta", "5"]},
    "experimental/prm": {"data": "steps", "micro": 60, "flags": ["--learning_rate", "1e-4", "--step_separator", " "]},
    "reward": {"data": "pairs", "micro": 90, "flags": ["--learning_rate", "1e-4"]},
    # a seed with which each of their steps has rows of both labels: metrics of a label that is absent are null
    "kto": {"data": "labelled", "micro": 90, "flags": ["--learning_rate", "8e-5", "--beta", "1", "--seed", "15"]},
    "experimental/bco": {"data": "labelled", "micro": 90, "flags": [
        "--learning_rate", "8e-5", "--beta", "0.3", "--seed", "15", "--udm"]},
    "grpo": {"data": "prompts", "micro": 90, "flags": [*ONLINE, "--beta", "0.01"]},
    "rloo": {"data": "prompts", "micro": 90, "flags": [*ONLINE, "--normalize_advantages"]},
    "experimental/grpo_sequence": {"data": "prompts", "micro": 90, "flags": [
        *ONLINE, "--loss_type", "luspo", "--importance_sampling_level", "sequence",
        "--off_policy_mask_threshold", "0.002"]},
    "experimental/grpo_token": {"data": "prompts", "micro": 90, "flags": [*ONLINE, "--sapo_temperature_neg", "2"]},
    "experimental/dppo": {"data": "prompts", "micro": 90, "flags": [
        *ONLINE, "--divergence_type", "binary_kl", "--epsilon", "1e-4"]},
    "experimental/gdpo": {"data": "prompts", "micro": 90, "flags": [*ONLINE, "--learning_rate", "1e-4"]},
    "experimental/gfpo": {"data": "prompts", "micro": 90, "flags": [
        *ONLINE, "--num_remains_in_group", "3", "--group_filter", "token_efficiency"]},
    "experimental/raft": {"data": "prompts", "micro": 90, "flags": [*ONLINE, "--num_remains", "2"]},
    # cooler: at 1.2 its prompts draw tokens so rare that exp(log ref - log pi) makes 2e-5 of rounding in that one step
    "experimental/dapo": {"data": "prompts", "micro": 90, "flags": [
        *ONLINE, "--beta", "0.01", "--sampling_rounds", "3", "--temperature", "1"]},
    "experimental/grpo_entropy": {"data": "prompts", "micro": 90, "flags": [
        *ONLINE, "--top_entropy_quantile", "0.2", "--entropy_coef", "0.01", "--use_adaptive_entropy",
        "--entropy_target", "0.035"]},
    # half of the steps learn from the data's completions; at 1.2 rare tokens round a gradient by 2e-5 of its norm
    "distillation": {"data": "demonstrations", "micro": 60, "flags": [
        "--teacher", "tiny", "--learning_rate", "5e-5", "--num_generations", "3", "--max_completion_length", "40",
        "--lmbda", "0.5", "--beta", "0.5"]},
    # the other half learns from completions that the teacher samples
    "experimental/gkd": {"data": "prompts", "micro": 60, "flags": [
        "--teacher", "tiny", "--learning_rate", "5e-5", "--num_generations", "3", "--max_completion_length", "40",
        "--seq_kd", "--temperature", "1"]},
    # half of the steps learn from the data's completions; both parts of the hybrid loss
    "experimental/gold": {"data": "demonstrations", "micro": 60, "flags": [
        "--teacher", "tiny:other_teacher", "--learning_rate", "5e-5", "--num_generations", "3",
        "--max_completion_length", "40", "--uld_use_hybrid_loss", "--top_p", "1"]},
    "experimental/sdft": {"data": "privileged", "micro": 60, "flags": [
        "--learning_rate", "5e-5", "--num_generations", "3", "--max_completion_length", "40",
        "--teacher_prompt_template", "{privileged_context}", "--teacher_model_kind", "ema",
        "--teacher_update_rate", "0.5", "--teacher_sync_steps", "2"]},
    "experimental/opsd": {"data": "privileged", "micro": 60, "flags": [
        "--learning_rate", "5e-5", "--num_generations", "3", "--max_completion_length", "40",
        "--rename", "privileged_context:solution", "--teacher_prompt_template", "{solution}"]},
    "experimental/sdpo": {"data": "prompts", "micro": 90, "flags": [
        "--learning_rate", "5e-5", "--num_generations", "4", "--max_completion_length", "40", "--temperature", "1.2",
        "--distillation_weight", "0.5", "--success_reward_threshold", "0.5", "--teacher_update_rate", "0.5",
        "--teacher_sync_steps", "2"]},
    "experimental/iw_opd": {"data": "prompts", "micro": 60, "flags": [
        "--teacher", "tiny", "--learning_rate", "5e-5", "--num_generations", "3", "--max_completion_length", "40"]},
    "experimental/ssd": {"data": "prompts", "micro": 60, "flags": [
        "--learning_rate", "2e-4", "--num_generations", "3", "--max_completion_length", "40", "--temperature", "0.8"]},
}  # fmt: skip


def with_row(table, name):
    """The nearest script with a row in a table of scripts: itself, or for one without, such as a new fork, a parent."""
    scripts = PARSED
    if f"methods/{name}.py" not in scripts:  # written since
        scripts = load(ROOT)
    parent = name
    while parent not in table:
        path = scripts[f"methods/{parent}.py"].parent
        if path not in scripts:
            raise KeyError(f"methods/{name}.py has no row in a table of the tests, FAST of conftest.py for one")
        parent = path.removeprefix("methods/").removesuffix(".py")
    return parent


FAST |= {name: FAST[with_row(FAST, name)] for name in SCRIPTS}


def tiny_flags(name):
    """Fast flags of a script. Of its tiny data the first 200 rows, and four that are held out, not its preset's 1,500
    and 200, which take longer to encode than a few steps to train: a test that looks at more says so."""
    data = FAST[name]["data"]
    heldout = "privileged[500:504]" if data == "privileged" else "test[:4]"
    usual = ["--lr_scheduler_type", "constant", "--save_minutes", "999", "--dataset", f"tiny:{data}[:200]"]
    return [*usual, "--eval_dataset", f"tiny:{heldout}", *FAST[name]["flags"]]


def tiny_rows(name, path, count, start=0):
    """The first rows of the script's tiny data as a file; returns its path as a flag's value."""
    lines = (ROOT / "common" / "tiny" / f"{FAST[name]['data']}.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[start : start + count]))
    return str(path)


@cache
def warm_up():
    """What tyro and transformers build and import at their first use, done here once and not in every fork."""
    tiny = ROOT / "common" / "tiny" / "model"
    tyro.cli(int, args=["1"])
    AutoTokenizer.from_pretrained(tiny)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder)


@cache
def script(name):
    """The module of methods/<name>.py under a name of its own. Importing one parses no flags."""
    warm_up()
    spec = importlib.util.spec_from_file_location("script_" + name.replace("/", "_"), METHODS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="the tests of tests/gpu/, which need a GPU, and no others")
    parser.addoption("--slow", action="store_true", help="everything: what is shared on every script, every mesh")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow only")
    config.option.loadscopereorder = False  # xdist would start with the files of most tests, which are not the longest


LONGEST = ["test_split", "test_resume", "test_smoke", "test_mesh", "test_alerts", "test_bad_input", "test_hangs",
           "test_faults", "test_hostile", "test_rewards"]  # first, so that no worker is left alone with one


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def once(*names):
    """Parameters for a test of what all scripts share: these scripts, and with --slow every other one, too."""
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS if name not in names)]


def lone_run(args):
    """What shared code that loads data needs of a Run, for one process that trains nothing."""
    return SimpleNamespace(args=args, rank=0, world=1, bar=None, beat=0.0, state={}, unread=set())


# ---- forked ranks ----------------------------------------------------------------------------------------------------


def _child(rank, world, folder, fn, args):
    log = os.open(f"{folder}/log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # pytest has its own
    gc.freeze()  # what the parent made is no garbage of ours: looking through it takes longer than a step
    torch.set_num_threads(1)
    try:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
        value = fn(rank, world, *args)
        torch.save(value, f"{folder}/value{rank}")
        dist.destroy_process_group()
    except BaseException as e:  # of any kind, SystemExit included: the parent shows it
        traceback.print_exc()
        with open(f"{folder}/error{rank}", "w") as f:
            f.write(f"{type(e).__name__}: {e}")
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def try_ranks(world, fn, *args):
    """fn(rank, world, *args) in `world` forked processes with gloo. Per rank: exit code (-9: killed), value, error
    ("Kind: message"), log. When one rank fails the others get two seconds: their collectives can never end."""
    folder, fork = tempfile.mkdtemp(prefix="ranks"), multiprocessing.get_context("fork")
    workers = [fork.Process(target=_child, args=(rank, world, folder, fn, args)) for rank in range(world)]
    for worker in workers:
        worker.start()
    end, failed = time.monotonic() + TIMEOUT, None
    while (alive := [w for w in workers if w.is_alive()]) and time.monotonic() < end:
        alive[0].join(0.02)
        if failed is None and any(w.exitcode for w in workers):
            failed, end = True, min(end, time.monotonic() + 2)
    hung = failed is None and [rank for rank, w in enumerate(workers) if w.is_alive()]
    for worker in workers:
        worker.kill()
        worker.join()

    def read(name, rank):
        path = Path(folder, f"{name}{rank}")
        return path.read_text(errors="replace") if path.is_file() else ""

    results = []
    for rank, worker in enumerate(workers):
        path = f"{folder}/value{rank}"
        value = torch.load(path, weights_only=False) if os.path.exists(path) else None  # our own child wrote it
        result = SimpleNamespace(code=worker.exitcode, value=value, error=read("error", rank), log=read("log", rank))
        results.append(result)
    shutil.rmtree(folder)
    assert not hung, f"ranks {hung} hang after {TIMEOUT} s:\n" + "\n".join(results[r].log[-2000:] for r in hung)
    return results


def ranks(world, fn, *args):
    """As try_ranks, where every rank has to end well: their values."""
    results = try_ranks(world, fn, *args)
    bad = [f"rank {i} ended with {r.code}: {r.log[-3000:]}" for i, r in enumerate(results) if r.code]
    assert not bad, "\n".join(bad)
    return [result.value for result in results]


def _main(_rank, _world, name, argv, patch):
    module = script(name)
    if patch:
        patch(module)
    args = module.parse_args(argv)
    module.main(args, setup(args, module.__file__))


def train(name, out, *flags, world=1, patch=None):
    """A run of methods/<name>.py in forked ranks; patch(module) changes the script in the children first."""
    script(name)  # imported here, once, so that forking is all a run costs
    return ranks(world, _main, name, [*tiny_flags(name), "--output_dir", str(out), *map(str, flags)], patch)


def try_train(name, out, *flags, world=1, patch=None):
    """As train, where the run may fail: one result per rank, see try_ranks."""
    script(name)
    return try_ranks(world, _main, name, [*tiny_flags(name), "--output_dir", str(out), *map(str, flags)], patch)


def _command(name, argv, log):
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    gc.freeze()
    torch.set_num_threads(1)  # again: a pool does not survive the fork, and its first use must not be by two threads
    sys.argv, code = [f"methods/{name}.py", *argv], 0
    try:
        runpy.run_path(str(METHODS / f"{name}.py"), run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def command(name, out, *flags):
    """`python methods/<name>.py ...` as a process that runs: the whole script as __main__, with its signal handlers and
    exit codes, but in a fork, which saves the seconds of its imports. ended() waits for it."""
    script(name)
    argv = [*tiny_flags(name), "--output_dir", str(out), *map(str, flags)]
    log = tempfile.mktemp(prefix="command")
    worker = multiprocessing.get_context("fork").Process(target=_command, args=(name, argv, log))
    worker.start()
    worker.log = log
    return worker


def ended(worker):
    """-> exit code and output of a command."""
    worker.join(TIMEOUT)
    hung = worker.exitcode is None
    worker.kill()
    worker.join()
    text = Path(worker.log).read_text(errors="replace")
    os.remove(worker.log)
    assert not hung, f"hangs after {TIMEOUT} s:\n{text[-2000:]}"
    return worker.exitcode, text


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def read_jsonl(path):
    """Lines of a run's file without what is about time, rate or memory. Broken JSON fails, a missing file is empty."""
    path = Path(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def trainer_tensors(checkpoint):
    """trainer/*.safetensors of a checkpoint as whole tensors, however many ranks wrote them."""
    reader = HuggingFaceStorageReader(str(Path(checkpoint) / "trainer"))
    found = reader.read_metadata().state_dict_metadata
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in found.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "torch.distributed is uninitialized": as it should be here
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(Path(checkpoint) / "trainer")), no_dist=True)
    return tensors


def newest(out):
    """The newest checkpoint folder of a run."""
    return max(Path(out).glob("checkpoint-*"))
