"""A slice of benchmarks/fault_campaign.py, and what no kill shows: the order in which names and bytes reach the disk.

The campaign says at its top what a fault is and what equal means. Here are a few of each kind, on at most two ranks.
"""
import errno
import fcntl
import importlib.util
import json
import os
import platform
import random
import shutil
import signal
import sys
import time
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import ROOT, SCRIPTS, command, ended, ranks, script, tiny_flags, tiny_rows, train, try_ranks, try_train

from common.runtime import folders
from common.runtime.launch import launch

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


def test_rank_0_dies_before_there_is_a_run_json(surveys):
    """The other rank writes none, which would not say whose the folder is: the folder would be refused ever after."""
    about = surveys(2)
    events = [" ".join(event) for event in about.events["fresh", 0]]
    for side in "before", "after":
        number = events.index("os.remove .run.json") + 1
        row = faults.crash(about, "fresh", 0, number, side)
        assert row["equal"], row


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


def each_sums_its_own(folder):
    """Writes what a rank fsyncs to folder/<rank>. Rank 0 sees no file that another rank wrote: its listing is old, as
    one of a network file system may be."""

    def patch(_module):
        rank = dist.get_rank()
        glob = Path.rglob

        def stale(path, pattern):
            return [found for found in glob(path, pattern) if rank or "shard-00002" not in found.name]

        Path.rglob = stale
        recorder(folder / str(rank))(None)

    return patch


def test_each_rank_sums_and_syncs_its_own_files(tmp_path):
    flags = ["--dataset", tiny_rows("sft", tmp_path / "rows.jsonl", 4), "--max_steps", 1, "--batch_size", 2]
    train("sft", tmp_path / "run", *flags, world=2, patch=each_sums_its_own(tmp_path))
    saved = tmp_path / "run" / "checkpoint-000001"
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert any("shard-00002" in name for name in files)
    meta = json.loads((saved / "trainer" / "meta.json").read_text())
    assert meta["crc32"].keys() == files - {"trainer/meta.json"} and folders.is_whole(saved)
    for rank in range(2):
        events = [json.loads(line) for line in (tmp_path / str(rank)).read_text().splitlines()]
        synced = {Path(path).name for event, path, *_ in events if event == "fsync" and ".tmp-checkpoint" in path}
        shards = {name[:11] for name in synced if name.startswith("shard-")}
        assert shards == {f"shard-{rank + 1:05}"}
        assert ("model.safetensors" in synced) == (rank == 0)


def test_checksums_of_large_files_take_little_memory(tmp_path):
    """Eight are read at a time: in large pieces they would be the peak of a small run."""
    wanted = {}
    for number in range(8):
        content = os.urandom(2**24)
        (tmp_path / str(number)).write_bytes(content)
        wanted[str(number)] = zlib.crc32(content)
    del content
    tracemalloc.start()
    assert dict(folders.checksums(tmp_path, sorted(tmp_path.iterdir()))) == wanted
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


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
    lock = tmp_path / "run" / "run.lock"  # says who was here last
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p != lock}
    code, text = ended(command("sft", tmp_path / "run", *flags, "--resume", "auto"))
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "no checkpoint is whole" in errors[0], text[-2000:]
    assert text.count(": damaged") == 3 and "Traceback" not in text
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p != lock}


# ---- two runs, one folder --------------------------------------------------------------------------------------------


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def training(out, *flags):
    """A command that has made its first checkpoint and has hundreds of steps before it."""
    worker = command("sft", out, *flags)
    end = time.monotonic() + 60
    while not list(out.glob("checkpoint-*")) and time.monotonic() < end:
        assert worker.is_alive(), Path(worker.log).read_text()
        time.sleep(0.02)
    return worker


def test_a_second_run_in_the_folder_of_a_live_one(tmp_path):
    """It says who is there and touches nothing. A killed holder blocks nobody, not even while a child of it lives."""
    rows, out = tiny_rows("sft", tmp_path / "rows.jsonl", 8), tmp_path / "run"
    flags = ["--dataset", rows, "--batch_size", 2, "--save_every", 1, "--eval_every", 0, "--resume", "auto"]
    first = training(out, *flags, "--max_steps", 100_000)
    code, text = ended(command("sft", out, *flags, "--max_steps", 100_000))
    (line,) = errors(text)
    assert code == 2 and f"in use by process {first.pid} on {platform.node()} since 20" in line, text
    assert json.loads((out / "run.json").read_text())["status"] == "running" and first.is_alive()
    first.kill()
    ended(first)
    (result,) = try_ranks(1, takes, out)
    assert result.value is True, result.log


def lock_and_fork(rank, world, out):
    assert folders.lock(out)
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def takes(rank, world, out):
    return folders.lock(out)


def test_a_child_does_not_inherit_the_lock(tmp_path):
    (result,) = try_ranks(1, lock_and_fork, tmp_path / "run")
    assert result.code == -signal.SIGKILL and ranks(1, takes, tmp_path / "run") == [True]


def starts_by_name(rank, world, place):
    os.chdir(place)
    module = script("sft")
    folder, _, error = folders.prepare_folder(module.parse_args([]), module.__file__, "0")
    dist.barrier()  # both hold their folders, and nobody has written anything yet
    return str(folder), error


def test_two_that_start_together_take_two_folders(tmp_path):
    assert sorted(ranks(2, starts_by_name, tmp_path)) == [("runs/sft", None), ("runs/sft-2", None)]


def test_a_file_system_without_locks_is_said(tmp_path):
    def patch(_module):
        def lockf(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        fcntl.lockf = lockf

    flags = ["--dataset", tiny_rows("sft", tmp_path / "rows.jsonl", 8), "--max_steps", 1, "--batch_size", 2]
    (result,) = try_train("sft", tmp_path / "run", *flags, patch=patch)
    lines = [line for line in result.log.splitlines() if "cannot be locked" in line]
    assert result.code == 0 and len(lines) == 1 and "No locks available" in lines[0], result.log


def test_a_refused_run_leaves_run_json_alone(three, tmp_path):
    """In containers process numbers repeat: a command that was refused does not write how it ended over another run."""
    flags, whole = three
    shutil.copytree(whole, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())

    def same_number(_module):
        (tmp_path / "run" / "run.json").write_text(json.dumps(about | {"pid": os.getpid()}))

    (result,) = try_ranks(1, launches, [*tiny_flags("sft"), *map(str, flags), "--output_dir", str(tmp_path / "run")],
                          same_number)
    assert result.code == 2 and "holds another run" in result.log
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def launches(rank, world, argv, patch):
    module = script("sft")
    patch(module)
    launch(module.main, module.parse_args(argv), module.__file__)


# ---- the order of checkpoints ----------------------------------------------------------------------------------------


def renumbered(out, steps):
    """The checkpoints of a short run as those of a long one: their names, and the step in meta.json."""
    for folder, step in zip(sorted(out.glob("checkpoint-*")), steps):
        path = folder / "trainer" / "meta.json"
        meta = json.loads(path.read_text()) | {"step": step}
        del meta["own_crc32"]
        path.write_text(json.dumps(meta | {"own_crc32": zlib.crc32(json.dumps(meta).encode())}))
        folder.rename(out / f"checkpoint-{step:06d}")


def test_step_1000000_comes_after_999500(three, tmp_path):
    """By number: what is resumed, what the rotation removes, what final/ is made of. A folder that only looks like a
    checkpoint is nobody's to resume from or to remove."""
    flags, whole = three
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "final")
    renumbered(out, [999_000, 999_500, 1_000_000])
    (out / "checkpoint-best" / "trainer").mkdir(parents=True)
    more = ["--resume", "auto", "--allow_changes", "--max_steps", 1_000_001, "--keep_last", 2]
    code, text = ended(command("sft", out, *flags, *more))
    assert code == 0 and f"resumed   {out}/checkpoint-1000000\n" in text and "skipped" not in text, text
    assert {path.name for path in out.glob("checkpoint-*")} == {
        "checkpoint-1000000", "checkpoint-1000001", "checkpoint-best"}
    newest = (out / "checkpoint-1000001" / "model.safetensors").read_bytes()
    assert (out / "final" / "model.safetensors").read_bytes() == newest
