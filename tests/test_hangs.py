"""A rank that hangs, is stopped or dies ends the run within --ddp_timeout: never a hang, and the message names it."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT, newest, ranks, read_jsonl, script, tiny_flags, tiny_rows, train, trainer_tensors, try_ranks, try_train,
)

from common.runtime import launch
from common.runtime.flags import InputError

LIMIT = 8  # seconds of --ddp_timeout


def sleeps():
    time.sleep(100)


def is_stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def trouble(what):
    """Before its second update, rank 1 does it."""

    def patch(module):
        clip_grad_norm = module.clip_grad_norm

        def broken(run, policy, limit):
            if run.rank == 1 and run.step == 1:
                what()
            return clip_grad_norm(run, policy, limit)

        module.clip_grad_norm = broken

    return patch


@pytest.mark.parametrize("what, said", [(sleeps, "rank 1 is in"), (is_stopped, "rank 1 does not answer")])
def test_a_rank_that_hangs_is_named(what, said, tmp_path):
    name = "sft"  # the machinery is the same text in every script
    flags = ["--dataset", tiny_rows(name, tmp_path / "rows.jsonl", 6), "--batch_size", 2, "--max_steps", 4]
    begun = time.monotonic()
    results = try_train(name, tmp_path / "run", *flags, "--ddp_timeout", LIMIT, "--save_every", 1, world=2,
                        patch=trouble(what))
    assert time.monotonic() - begun < 40
    assert results[0].code == 1
    lines = [line for result in results for line in result.log.splitlines()]
    (line,) = [line for line in lines if line.startswith("error: step 2: no progress")]
    assert said in line and "rank 0 is in" in line and "--resume auto" in line
    assert (tmp_path / "run" / "checkpoint-000001").is_dir()


def asked_to_stop():
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()


def test_a_dead_rank_is_named_after_a_signal(tmp_path, monkeypatch):
    """As under NCCL: rank 0 waits for a rank that is gone, where no handler of Python's runs, and gets SIGTERM. It says
    who does not answer before --ddp_timeout, and waits on."""
    monkeypatch.setattr(launch, "SILENCE", 1.0)

    def patch(module):
        trouble(is_stopped)(module)
        if torch.distributed.get_rank() == 0:
            later = module.clip_grad_norm

            def signalled(run, policy, limit):
                if run.step == 1:
                    asked_to_stop()
                return later(run, policy, limit)

            module.clip_grad_norm = signalled

    flags = ["--dataset", tiny_rows("sft", tmp_path / "rows.jsonl", 6), "--batch_size", 2, "--max_steps", 4]
    results = try_train("sft", tmp_path / "run", *flags, "--ddp_timeout", LIMIT, world=2, patch=patch)
    lines = [line for line in results[0].log.splitlines() if line.startswith("error: step 2: no progress for")]
    assert len(lines) == 2 and "1 s since a signal to stop" in lines[0] and f"{LIMIT} s" in lines[1]
    for line in lines:
        assert "rank 1 does not answer" in line and "rank 0 is in" in line


def timeouts(_rank, _world, argv):
    module = script("sft")
    args = module.parse_args(argv)
    run = launch.setup(args, module.__file__)
    mesh = module.init_device_mesh("cpu", run.mesh_shape, mesh_dim_names=("replicate", "shard", "tp"))
    return mesh["tp"].get_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_groups_of_the_mesh_have_the_runs_timeout(tmp_path):
    argv = [*tiny_flags("sft"), "--output_dir", str(tmp_path / "run"), "--ddp_timeout", "321", "--tp_size", "2"]
    assert ranks(4, timeouts, argv) == [642] * 4


def ends_on_rank_1(rank, _world, argv):
    os.environ["RANK"] = str(rank)
    module = script("sft")
    resume = module.resume

    def refuse(run, *rest):
        if run.rank == 1:
            raise InputError("only rank 1 knows")
        resume(run, *rest)

    module.resume = refuse
    launch.launch(module.main, module.parse_args(argv), module.__file__)


def test_the_exit_code_of_any_rank_stops_restarts(tmp_path):
    """torchrun starts all ranks again when one ends; rank 0 then finds in run.json that it would end the same way."""
    argv = [*tiny_flags("sft"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    results = try_ranks(2, ends_on_rank_1, argv)
    assert results[1].code == 2 and "error: only rank 1 knows" in results[1].log
    assert json.loads((tmp_path / "run" / "run.json").read_text())["exit_code"] == 2


def children(pid):
    """Processes that torchrun has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
            variables = dict(word.split("=", 1) for word in words if "=" in word)
            parent = next(x for x in (path.parent / "status").read_text().splitlines() if x.startswith("PPid"))
        except OSError:
            continue  # it has ended meanwhile, or is not ours
        if parent.split()[1] == str(pid) and "RANK" in variables:
            found[int(variables["RANK"])] = int(path.parent.name)
    return found


def test_torchrun_restarts_and_the_run_resumes_by_itself(tmp_path):
    """kill -9 of one worker: the other names it, torchrun starts both again, and the end is the undisturbed one's.
    Without --output_dir the restart finds its own folder, not the first of its name, which is another run's."""
    flags = [*tiny_flags("sft"), "--dataset", tiny_rows("sft", tmp_path / "rows.jsonl", 12), "--batch_size", "2"]
    flags += ["--max_steps", "16", "--save_every", "2"]
    whole, out = tmp_path / "runs" / "sft", tmp_path / "runs" / "sft-2"
    train("sft", whole, *flags, world=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts",
               "1", str(ROOT / "methods" / "sft.py"), *flags]
    log = tmp_path / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        runner = subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path, env=environment)
    end = time.monotonic() + 60
    while not list(out.glob("checkpoint-*")) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(children(runner.pid)[1], signal.SIGKILL)
    assert runner.wait(120) == 0, log.read_text()[-3000:]
    assert "resumed " in log.read_text() and "rank 1 does not answer" in log.read_text()
    a, b = (trainer_tensors(newest(folder)) for folder in (whole, out))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert read_jsonl(whole / "metrics.jsonl") == read_jsonl(out / "metrics.jsonl")
