"""common/runtime/encoding.py: however many ranks and processes encode the rows, the groups are those of one loop."""

import json
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import ROOT, lone_run, ranks, tiny_rows, try_train

from common.data import Row
from common.runtime import encoding
from common.runtime.encoding import encode_rows
from common.tokenization import encode_demonstration, load_tokenizer, stop_ids

ARGS = SimpleNamespace(chat_template_kwargs="{}", max_length=999, overlong="drop")
TINY = str(ROOT / "common" / "tiny" / "model")


def numbered_rows(count):
    """Chats of one to three turns, so that rows have several lengths, and several spans of scored tokens."""
    rows = []
    for number in range(count):
        turn = [{"role": "user", "content": f"{number}+1"}, {"role": "assistant", "content": f"#### {number + 1}"}]
        row = Row(messages=turn * (1 + number % 3))
        row.index, row.where = number, f"rows:{number + 1}"
        rows.append(row)
    return rows


def one_loop(rows):
    """The oracle: no rank, no process, no tensor."""
    tokenizer = load_tokenizer(TINY)
    groups = []
    for row in rows:
        groups += encode_demonstration(row, tokenizer, stop_ids(tokenizer))
    return groups


def encoded(run, rows, **more):
    tokenizer = load_tokenizer(TINY)
    return encode_rows(run, rows, encode_demonstration, tokenizer, stop_ids(tokenizer), **more)


def test_processes(monkeypatch):
    monkeypatch.setattr(encoding, "MANY_ROWS", 1)
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 7)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    rows = numbered_rows(50)
    assert encoded(lone_run(ARGS), rows) == one_loop(rows)


def on_rank(rank, world, count):
    encoding.CHUNK_ROWS = 4
    run = SimpleNamespace(args=ARGS, rank=rank, world=world, group=dist.group.WORLD, device="cpu", bar=None, beat=0.0)
    run.unread = set()
    rows = numbered_rows(count)
    return encoded(run, rows) == one_loop(rows) and (run.beat > 0 or rank * 4 >= count)


@pytest.mark.parametrize("count", (30, 3))  # three rows are one chunk: the other ranks have none
def test_ranks(count):
    assert ranks(3, on_rank, count) == [True] * 3


def test_marks_travel():
    groups = one_loop(numbered_rows(4))
    groups[1].update(split=True, lost=True)
    groups[3].update(equal=True, completions=[])
    assert encoding.tensors_to_groups(encoding.groups_to_tensors(groups, "cpu")) == groups


def test_a_killed_process_is_not_a_short_data_set(monkeypatch):
    monkeypatch.setattr(encoding, "MANY_ROWS", 1)
    monkeypatch.setattr(encoding, "CHUNK_ROWS", 5)
    parent = os.getpid()
    encode_chunk = encoding.encode_chunk

    def dies(rows, *settings):
        if rows[0].index == 25 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_chunk(rows, *settings)

    monkeypatch.setattr(encoding, "encode_chunk", dies)
    with pytest.raises(RuntimeError, match="was killed"):
        encoded(lone_run(ARGS), numbered_rows(50))


def test_the_first_wrong_row_ends_all_ranks(tmp_path):
    """A row that no encoding is made for, on a rank that is not the first."""
    good = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps(good)] * 300 + [json.dumps({"messages": [good["messages"][0]]})] + [json.dumps(good)] * 300
    rows.write_text("\n".join(lines))
    results = try_train("sft", tmp_path / "run", "--dataset", rows, world=2)
    for result in results:
        assert re.search(r"InputError: no assistant turn .*rows\.jsonl:301", result.error)


def test_long_healthy_work_outlives_the_watchdog(tmp_path):
    """Encoding, the reference's pass and the step take longer than --ddp_timeout each, and none of their parts does."""
    data = tiny_rows("dpo", tmp_path / "rows.jsonl", 12)

    def patch(module):
        encoding.CHUNK_ROWS = 1
        encode_chunk = encoding.encode_chunk

        def slow_chunk(*settings):
            time.sleep(0.2)
            return encode_chunk(*settings)

        encoding.encode_chunk = slow_chunk
        forward = module.Policy.forward

        def slow_forward(*args, **kwargs):
            time.sleep(0.2)
            return forward(*args, **kwargs)

        module.Policy.forward = slow_forward

    flags = ["--dataset", data, "--eval_dataset", "", "--batch_size", 12, "--max_steps", 1]
    flags += ["--tokens_per_microbatch", 60, "--ddp_timeout", 2]
    (result,) = try_train("dpo", tmp_path / "run", *flags, patch=patch)
    assert result.code == 0, result.log
