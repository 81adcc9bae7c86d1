"""A rank that hangs, is stopped or dies ends the run within --ddp_timeout: never a hang, and the message names it."""
import os
import signal
import time

import pytest
from conftest import tiny_rows, try_train

LIMIT = 10  # seconds of --ddp_timeout


def sleeps():
    time.sleep(100)


def is_stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def trouble(what):
    """Before its second update, rank 1 does it."""

    def patch(module):
        update = module.update

        def broken(policy, optimizer, lr, metrics, groups, step, run):
            if run.rank == 1 and step == 1:
                what()
            return update(policy, optimizer, lr, metrics, groups, step, run)

        module.update = broken

    return patch


@pytest.mark.parametrize("what, said", [(sleeps, "rank 1 is in"), (is_stopped, "rank 1 does not answer")])
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_rank_that_hangs_is_named(name, what, said, tmp_path):
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
