"""A slice of benchmarks/fault_campaign.py, and what no kill shows: the order in which names and bytes reach the disk.

The campaign says at its top what a fault is and what equal means. Here are a few of each kind, on at most two ranks.
"""
import importlib.util
import json
import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SCRIPTS, command, ended, tiny_rows, train

spec = importlib.util.spec_from_file_location("fault_campaign", ROOT / "benchmarks" / "fault_campaign.py")
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

POINTS = {  # scenario, ranks, victim, event, sides: where something was wrong once, or would be first
    "a shard half written": ("fresh", 1, 0, "open .tmp-checkpoint/trainer/shard", ["torn"]),
    "an export half written": ("fresh", 1, 0, "write .tmp-checkpoint/model.safetensors", ["torn"]),
    "the marker half written": ("fresh", 1, 0, "open .tmp-checkpoint/trainer/meta.json", ["torn"]),
    "the new name": ("fresh", 1, 0, "os.rename .tmp-checkpoint", ["before", "power"]),
    "the rotation": ("fresh", 1, 0, "os.rename checkpoint-000001", ["before", "power"]),
    "the rotation half done": ("fresh", 1, 0, "os.remove .old-checkpoint-000001", ["power"]),
    "a line half written": ("resumed", 1, 0, "open metrics.jsonl", ["torn"]),
    "the damaged one": ("resumed", 1, 0, "os.rename checkpoint-000002", ["after"]),
    "the end": ("fresh", 1, 0, "os.rename .tmp-final", ["after"]),
    "two ranks": ("fresh", 2, 0, "os.rename .tmp-checkpoint", ["before"]),
    "the other rank": ("fresh", 2, 1, "open .tmp-checkpoint/trainer/shard-00002", ["torn"]),
}


@pytest.fixture(scope="module")
def surveys(tmp_path_factory):
    """ranks -> what crash() needs, made once."""
    made = {}

    def survey(world):
        if world not in made:
            made[world] = faults.survey(faults.load("sft"), world, tmp_path_factory.mktemp(f"points{world}"))
        return made[world]

    return survey


@pytest.mark.parametrize("case", POINTS)
def test_points(case, surveys):
    """SIGKILL at file-system events. The hook looks at every event of every run: never without a whole checkpoint once
    there is one, never more than keep_last + 1, and a name only for what is whole and was seen being written."""
    scenario, world, victim, start, sides = POINTS[case]
    about = surveys(world)
    events = [" ".join(event) for event in about.events[scenario, victim]]
    number = max(i for i, event in enumerate(events, 1) if event.startswith(start))
    for side in sides:
        assert (scenario, victim, number, side) in about.points
        row = faults.crash(about, scenario, victim, number, side)
        assert row["equal"] and row["what"].startswith(start.split(" ")[0]), row


def test_points_are_all(surveys):
    """Each file of a checkpoint is an event, whoever writes it; and each event is a point on every side."""
    about = surveys(1)
    opened = {path for event, path in about.events["fresh", 0] if event in ("open", "write")}
    left = {p.relative_to(about.folder / "whole" / "checkpoint-000002") for p in
            (about.folder / "whole" / "checkpoint-000002").rglob("*") if p.is_file()}
    assert len(left) > 8 and {f".tmp-checkpoint/{path}" for path in left} <= opened
    for (scenario, rank), events in about.events.items():
        points = [point for point in about.points if point[:2] == (scenario, rank)]
        assert {number for _, _, number, _ in points} == set(range(1, len(events) + 1))
        assert all(sum(n == number for _, _, n, _ in points) >= 3 for _, _, number, _ in points)


@pytest.mark.parametrize("name, world, kinds", [
    ("sft", 1, ["all", "flip", "full", "read-only", "gone"]),
    pytest.param("grpo", 2, ["one", "full"], marks=pytest.mark.slow),  # `one` is test_resume's, on two ranks
])
def test_random_faults(name, world, kinds, tmp_path):
    """One after the other; `full` by RLIMIT_FSIZE, which needs no rights."""
    args = SimpleNamespace(seed=1, faults=len(kinds), kinds=kinds)
    rows = [row for rows in faults.campaign(name, world, args, [], tmp_path, None) for row in rows]
    assert len(rows) == len(kinds) and all(row["equal"] for row in rows), rows
    assert {row["kind"] for row in rows} <= {*kinds, "all"}


def test_other_mesh(tmp_path):
    (row,) = faults.moved("sft", tmp_path, {"1-2-1": [(1, ""), (2, ""), (1, "")]}, random.Random(0), ["1-2-1"])
    assert row["equal"] and [kill["world"] for kill in row["kills"]] == [1, 2], row
    assert 0 < row["learning_rates_apart"] < faults.PER_LR  # two ranks add in another order: 0 would be no comparison


# ---- the order on the disk -------------------------------------------------------------------------------------------


def recorder(path):
    """Writes the order of file-system events to `path`: what is opened for writing, fsynced, renamed, removed."""

    def patch(_module):
        real = os.fsync

        def note(*event):
            with open(path, "a") as f:
                f.write(json.dumps(event) + "\n")

        def hook(event, args):
            target = str(args[0]) if args else ""
            if "/run/" not in target:
                return
            flags = args[2] if event == "open" and isinstance(args[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR) or event == "os.mkdir":
                note("write", target)
            elif event == "os.rename":
                note("rename", target, str(args[1]), [str(p) for p in Path(target).rglob("*")])
            elif event == "shutil.rmtree":
                note("remove", target)

        def fsync(descriptor):
            real(descriptor)
            note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

        sys.addaudithook(hook)
        os.fsync = fsync

    return patch


@pytest.mark.parametrize("name", SCRIPTS[:1])  # shared machinery, byte-identical in every script (test_copies)
def test_order_on_the_disk(name, tmp_path):
    """Power may fail too. A folder gets its name when all in it, and the log lines that it counts on, are on the disk,
    never before; its name is on the disk before anything older goes; nothing is written under a name."""
    flags = ["--dataset", tiny_rows(name, tmp_path / "rows.jsonl", 8), "--max_steps", 2, "--save_every", 1]
    out = tmp_path / "run"
    train(name, out, *flags, "--keep_last", 1, "--batch_size", 2, patch=recorder(tmp_path / "events"))
    events, safe, named = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()], set(), []
    for i, (event, path, *more) in enumerate(events):
        place = Path(path).relative_to(out).parts[0] if Path(path) != out else ""
        safe |= {path} if event == "fsync" else set()
        safe -= {path} if event == "write" else set()
        assert event != "write" or not place.startswith(("checkpoint-", "final")), f"{path} is written in place"
        if event == "rename" and place in (".tmp-checkpoint", ".tmp-final"):
            named.append(Path(more[0]).name)
            needed = {path, *more[1]} | ({str(out / "metrics.jsonl")} if place == ".tmp-checkpoint" else set())
            assert len(more[1]) > 6 and not needed - safe, f"not on the disk: {sorted(needed - safe)}"
        if event == "rename" and not more[1]:  # a file: run.json, log-probs of a reference
            assert path in safe, f"{path} is not on the disk"
        elif event == "rename":
            after = next(e[:2] for e in events[i + 1 :] if e[0] != "write")
            assert after == ["fsync", str(out)], f"the new name of {path} is not on the disk before {after}"
    assert named == ["checkpoint-000001", "checkpoint-000002", "final"]
    assert [Path(path).name for event, path, *_ in events if event == "remove"] == [
        ".tmp-rehearsal", ".old-checkpoint-000001"]


# ---- damaged ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Flags, and a run with checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    flags = ["--dataset", tiny_rows("sft", folder / "rows.jsonl", 8), "--max_steps", 3, "--save_every", 1]
    flags += ["--batch_size", 2, "--eval_every", 0, "--eval_rows", 2]
    train("sft", folder / "run", *flags, "--keep_last", 3)
    return flags, folder / "run"


def test_every_damaged_checkpoint_is_named(three, tmp_path):
    """Two in a row; the one before is used, and keep_last counts none that is damaged."""
    flags, whole = three
    shutil.copytree(whole, tmp_path / "run")
    meta = tmp_path / "run" / "checkpoint-000003" / "trainer" / "meta.json"
    text = meta.read_text()
    meta.write_text(text.replace('"step": 3', '"step": 1', 1))  # good JSON, and every other file is as it says
    assert meta.read_text() != text
    (tmp_path / "run" / "checkpoint-000002" / "model.safetensors").write_bytes(b"x")
    code, text = ended(command("sft", tmp_path / "run", *flags, "--keep_last", 1, "--resume", "auto"))
    assert code == 0 and f"resumed   {tmp_path / 'run' / 'checkpoint-000001'}" in text, text[-2000:]
    assert all(f"skipped {tmp_path / 'run' / name}: damaged" in text
               for name in ("checkpoint-000003", "checkpoint-000002"))
    found, reference = faults.remains(tmp_path / "run"), faults.kept(faults.remains(whole), [3])
    assert not faults.differences(found, reference)


def test_no_checkpoint_is_whole(three, tmp_path):
    """What cannot be read today may be readable tomorrow: nothing is removed, and the run does not start over."""
    flags, whole = three
    shutil.copytree(whole, tmp_path / "run")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / "config.json").write_text("{}")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    code, text = ended(command("sft", tmp_path / "run", *flags, "--resume", "auto"))
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "no checkpoint is whole" in errors[0], text[-2000:]
    assert text.count(": damaged") == 3 and "Traceback" not in text
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
