"""Folders of strangers, and strangers' files in ours: nothing but our own is removed or cut, no link is followed where
we write, none leads out of a model, only regular files are opened, and a forged checkpoint is a damaged one."""
import json
import math
import os
import shutil
import signal
import stat
import time
import zlib
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
from conftest import ROOT, SCRIPTS, command, ended, once, script, tiny_rows, train, try_train
from safetensors.torch import load_file, save_file

from common.runtime import folders
from common.runtime.run import open_own, record, write

MODEL = ROOT / "common" / "tiny" / "model"
CANARY = "hf_CANARYTOKEN"
UMASK = 0o027


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags, and a run of two steps with checkpoints 1 and 2 and final/, made under another umask and with a token in
    its environment, from a model folder with more chat templates than one."""
    folder = tmp_path_factory.mktemp("base")
    templates = folder / "model" / "additional_chat_templates"
    shutil.copytree(MODEL, folder / "model")
    templates.mkdir()
    shutil.copy(MODEL / "chat_template.jinja", templates / "tool_use.jinja")
    (templates / "other.jinja").write_text(f"{{# {CANARY} #}}")
    flags = ["--model", folder / "model", "--dataset", tiny_rows("sft", folder / "rows.jsonl", 8), "--batch_size", 2]
    flags += ["--max_length", 256, "--max_steps", 2, "--save_every", 1, "--eval_dataset", ""]

    def patch(_module):
        os.environ["HF_TOKEN"] = CANARY
        os.umask(UMASK)

    train("sft", folder / "run", *flags, patch=patch)
    return flags, folder / "run"


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("a key\n")
    return path


def contents(folder):
    """What every name of a folder is: bytes, or where a link leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = stat.S_IFMT(path.lstat().st_mode)
    return found


def errors(text):
    """The lines of an error that was said as it should be."""
    assert "Traceback" not in text, text[-3000:]
    return [line for line in text.splitlines() if line.startswith("error: ")]


def refused(worker, *needles):
    """A command ends with one line and exit code 2."""
    code, text = ended(worker)
    assert code == 2, (code, text[-2000:])
    (line,) = errors(text)
    assert all(str(needle) in line for needle in needles), line


def prepared(name, out, *flags):
    """What `prepare_folder` says of a folder: checkpoint and error. It has run in a child, for it takes a lock."""
    module = script(name)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(20)  # a hang
        args = module.parse_args(["--output_dir", str(out), *map(str, flags)])
        _, checkpoint, error = folders.prepare_folder(args, module.__file__, "0")
        os.write(writer, json.dumps([checkpoint and checkpoint.name, error]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = json.loads(file.read())
    os.waitpid(pid, 0)
    return answer


# ---- S7: what is removed -----------------------------------------------------------------------------------------


def foreign_folder(folder):
    (folder / ".old-photos").mkdir(parents=True)
    (folder / ".old-photos" / "1.jpg").write_bytes(b"jpg")
    (folder / ".tmp-thesis").write_text("chapter 1")
    (folder / ".tmp-save").mkdir()
    (folder / "rows.jsonl").write_text("{}\n")
    return folder


TAKEN = {  # what a run would cut, replace or remove, were the folder its own
    "logs": ["metrics.jsonl", "samples.jsonl", "alerts.jsonl"],
    "one log": ["samples.jsonl"],
    "passing names": [".tmp-checkpoint/thesis.tex", ".old-final/1.jpg", ".old-checkpoint-000007/1.jpg"],
    "a file with a passing name": [".tmp-rehearsal"],
    "final": ["final/thesis.tex"],
    "another trainer's checkpoint": ["checkpoint-100000/optimizer.pt"],
    "another program's run.json": ["run.json", "metrics.jsonl", ".tmp-final/x"],
}
STARTS = [{}, {"resume": "auto"}, {"resume": "auto", "allow_changes": True}, {"max_steps": 0}]


@cache
def parsed(name):
    return script(name).parse_args([])


@pytest.mark.parametrize("case", TAKEN)
def test_folders_of_others_are_left_as_they_are(case, tmp_path):
    """Every script, every way to start, torchrun's second attempt too: refused with one line, and not a byte differs,
    no run.lock either."""
    out = foreign_folder(tmp_path / "out")
    for name in TAKEN[case]:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text('{"status": "done", "command": "make"}\n')
    before = contents(out)
    for name in SCRIPTS:
        usual = parsed(name)
        for changes in STARTS:
            args = replace(usual, output_dir=str(out), **changes)
            for attempt in ("0", "1"):
                _, _, error = folders.prepare_folder(args, script(name).__file__, attempt)
                assert error and "holds other files" in error, (name, changes)
                assert TAKEN[case][0].split("/")[0] in error
    assert contents(out) == before


def other_values(field, value, out):
    """What a flag may be beside its default; of --resume also folders, of which one is there and one is not."""
    if field.name == "resume":
        return ["auto", str(out / "checkpoint-100000"), str(out / "checkpoint-000001"), str(out / "final")]
    if get_origin(field.type) is Literal:
        return [one for one in get_args(field.type) if one != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1]
    return [(*value, "other")] if isinstance(value, tuple) else ["other"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_flag_touches_the_folder_of_others(name, tmp_path):
    """Each flag of each script by itself, in folders of both kinds: with another trainer's checkpoint, and without."""
    before = {}
    for case in ("logs", "another trainer's checkpoint"):
        out = foreign_folder(tmp_path / case.split()[0])
        for file in TAKEN[case]:
            (out / file).parent.mkdir(exist_ok=True)
            (out / file).write_text("1\n")
        before[out] = contents(out)
    usual = parsed(name)
    count = 0
    for out in before:
        for field in fields(usual):
            if field.name == "output_dir":
                continue
            for value in other_values(field, getattr(usual, field.name), out):
                args = replace(usual, output_dir=str(out), **{field.name: value})
                for attempt in ("0", "1"):
                    _, checkpoint, error = folders.prepare_folder(args, script(name).__file__, attempt)
                    assert error and checkpoint is None, (field.name, value)
                    count += 1
        assert contents(out) == before[out]
    assert count > 100


@pytest.mark.parametrize("name", once("sft", "grpo", "experimental/gkd"))
def test_a_command_in_the_folder_of_others(name, tmp_path):
    """From the command line to its end: with its strongest flags."""
    out = foreign_folder(tmp_path / "out")
    (out / "metrics.jsonl").write_text("1\n")
    before = contents(out)
    for flags in ["--resume", "auto", "--allow_changes"], ["--save_every", 1, "--keep_last", 1]:
        worker = command(name, out, "--max_steps", 1, *flags)
        refused(worker, "holds other files (metrics.jsonl)", "--output_dir")
    assert contents(out) == before


def test_a_run_beside_files_of_others(base, tmp_path):
    """They have names of their own: the run goes on beside them, is resumed, starts over, and leaves them alone."""
    flags, run = base
    out = tmp_path / "out"
    shutil.copytree(run, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoint-000002")
    foreign_folder(out)
    before = contents(foreign_folder(tmp_path / "before"))
    shutil.copytree(out / "checkpoint-000001", out / ".tmp-checkpoint")  # of ours, and goes
    code, text = ended(command("sft", out, *flags, "--resume", "auto"))
    assert code == 0 and "resumed" in text, text[-2000:]
    found = contents(out)
    assert {name: found[name] for name in before} == before
    assert not (out / ".tmp-checkpoint").exists()


def test_a_fresh_start_removes_what_a_run_of_ours_left(base, tmp_path):
    """A run that ended with exit code 2 occupies no folder: its logs and passing folders go, the rest does not."""
    out = foreign_folder(tmp_path / "out")
    about = json.loads((base[1] / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(about | {"exit_code": 2}))
    (out / "alerts.jsonl").write_text("{}\n")
    (out / ".old-final").mkdir()
    assert prepared("sft", out) == [None, None]
    assert contents(out).keys() - {"run.lock"} == contents(foreign_folder(tmp_path / "before")).keys()


# ---- S8: links where we write ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--resume", "auto"], []], ids=["auto", "never"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "alerts.jsonl", "run.json", "run.lock", "debug"])
def test_links_in_a_run_of_a_stranger(name, flags, base, victim, tmp_path):
    """The whole run is theirs, with checkpoints: it may be resumed, but through no link. Without a checkpoint, too."""
    out = tmp_path / "out"
    if flags:
        shutil.copytree(base[1], out)
        (out / name).unlink(missing_ok=True)
    else:
        out.mkdir()
    (out / name).symlink_to(tmp_path if name == "debug" else victim)
    before = contents(out)
    _, error = prepared("sft", out, *flags)
    assert error and ("is a link" in error or "holds other files" in error) and name in error
    assert contents(out) == before and victim.read_text() == "a key\n"


def test_a_command_whose_log_is_a_link(base, victim, tmp_path):
    flags, run = base
    out = tmp_path / "out"
    shutil.copytree(run, out)
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").symlink_to(victim)
    refused(command("sft", out, *flags, "--resume", "auto"), "metrics.jsonl is a link", "--output_dir")
    assert victim.read_text() == "a key\n"


def test_a_link_for_the_passing_name_of_run_json(victim, tmp_path):
    (tmp_path / ".run.json").symlink_to(victim)
    record(tmp_path, status="running")
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "running"}
    assert victim.read_text() == "a key\n" and not (tmp_path / "run.json").is_symlink()


@pytest.mark.parametrize("mode", ["w", "a", "r+", "x"])
def test_a_file_of_the_run_is_itself(mode, victim, tmp_path):
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in "link", "dangling", "pipe":
        with pytest.raises(OSError):
            open_own(tmp_path / name, mode)
    assert victim.read_text() == "a key\n" and not (tmp_path / "nowhere").exists()


def test_a_line_of_a_log_does_not_follow_a_link(victim, tmp_path):
    (tmp_path / "samples.jsonl").symlink_to(victim)
    with pytest.raises(OSError):
        write(SimpleNamespace(rank=0, out=tmp_path), "samples.jsonl", {"step": 1})
    assert victim.read_text() == "a key\n"


@pytest.mark.parametrize("name", [".tmp-rehearsal", ".tmp-checkpoint", ".tmp-final", "debug/step-1-rank-0.json"])
def test_links_that_someone_lays_while_a_run_writes(name, base, victim, tmp_path):
    """Into a folder that others can write to."""
    flags, _ = base
    (tmp_path / "precious").mkdir()

    def patch(module):
        check_data = module.check_data

        def plant(run, *more):
            (run.out / name).parent.mkdir(exist_ok=True)
            (run.out / name).symlink_to(victim if name.endswith(".json") else tmp_path / "precious")
            check_data(run, *more)

        module.check_data = plant
        if name.endswith(".json"):
            module.sft_loss = lambda out, args: out["logprobs"].sum() * math.nan  # TRAIN001 writes the rows

    (result,) = try_train("sft", tmp_path / "out", *flags, patch=patch)
    assert result.code == 1 and result.error, result.log
    assert victim.read_text() == "a key\n" and not list((tmp_path / "precious").iterdir())


# ---- S9: links in what is read, and what is published ------------------------------------------------------------


def test_links_out_of_a_model(base, tmp_path):
    """One line before anything is read, and the secret is nowhere in the run."""
    flags, _ = base
    (tmp_path / "secret").write_text(f"HF_TOKEN={CANARY}\n")
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").symlink_to(tmp_path / "secret")
    refused(command("sft", tmp_path / "out", *flags, "--model", model), "tool.jinja", "link", "--model")
    assert not any(CANARY.encode() in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_links_that_a_model_may_hold(tmp_path):
    """Into itself, and of a hub's cache into its own blobs; whatever else leads elsewhere."""
    (tmp_path / "secret").write_text(CANARY)
    hub = tmp_path / "models--a--b"
    model = hub / "snapshots" / "1234"
    model.mkdir(parents=True)
    (hub / "blobs").mkdir()
    (hub / "blobs" / "abcd").write_text("{}")
    (model / "config.json").symlink_to("../../blobs/abcd")
    (model / "README.md").symlink_to("config.json")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").symlink_to("../../../blobs/abcd")
    folders.check_links(model)
    (tmp_path / "model").symlink_to(model)
    folders.check_links(tmp_path / "model")  # by a link that its user made
    for target in "/proc/self/environ", tmp_path / "secret", "../../../secret", hub / "blobs" / "out", "/dev/zero":
        (hub / "blobs" / "out").unlink(missing_ok=True)
        (hub / "blobs" / "out").symlink_to(tmp_path / "secret")
        for name in "notes.txt", "additional_chat_templates/other.jinja":
            (model / name).symlink_to(target)
            with pytest.raises(ValueError, match=Path(name).name):
                folders.check_links(model)
            (model / name).unlink()
    (model / "more").symlink_to(tmp_path)  # a folder
    with pytest.raises(ValueError, match="more"):
        folders.check_links(model)
    (model / "more").unlink()
    shutil.rmtree(hub / "blobs")
    (hub / "blobs").symlink_to("/proc/self")  # as a stranger's repository may hold them
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("../../blobs/environ")  # as does README.md by way of it
    with pytest.raises(ValueError, match="leads out"):
        folders.check_links(model)


def test_a_model_in_the_cache_of_the_hub_is_read(base, tmp_path):
    flags, _ = base
    model = tmp_path / "models--a--b" / "snapshots" / "1234"
    model.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for path in MODEL.iterdir():
        shutil.copy(path, tmp_path / "models--a--b" / "blobs" / path.name)
        (model / path.name).symlink_to(f"../../blobs/{path.name}")
    code, text = ended(command("sft", tmp_path / "out", *flags, "--model", model, "--max_steps", 0))
    assert code == 0, text[-2000:]


def test_nothing_secret_is_published(base):
    """A token in the environment is in no file of a run, and neither are chat templates that no row can be in."""
    _, run = base
    for path in run.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
    templates = run / "final" / "additional_chat_templates"
    assert [path.name for path in templates.iterdir()] == ["tool_use.jinja"]
    assert (run / "final" / "chat_template.jinja").read_bytes() == (MODEL / "chat_template.jinja").read_bytes()


def test_final_is_what_the_checkpoint_names(base, tmp_path):
    """A stranger's checkpoint that is at its last step already: nothing is trained, and nothing more is published."""
    flags, run = base
    out = tmp_path / "out"
    shutil.copytree(run, out)
    shutil.rmtree(out / "final")
    (tmp_path / "secret").write_text(CANARY)
    newest = out / "checkpoint-000002"
    (newest / "notes.txt").symlink_to(tmp_path / "secret")
    (newest / "more").symlink_to(tmp_path)
    (newest / "unnamed.txt").write_text("x")
    os.mkfifo(newest / "pipe")
    os.mkfifo(newest / "trainer" / "x.safetensors")  # of those that torch would read
    code, text = ended(command("sft", out, *flags, "--resume", "auto"))
    assert code == 0, text[-2000:]
    assert contents(out / "final").keys() == contents(run / "final").keys()
    assert not any(path.is_symlink() for path in (out / "final").rglob("*"))


@pytest.mark.parametrize("name", ["config.json", "trainer/state.safetensors", "trainer/meta.json", "trainer"])
def test_a_checkpoint_with_a_link_is_not_whole(name, base, tmp_path):
    folder = tmp_path / "checkpoint-000002"
    shutil.copytree(base[1] / "checkpoint-000002", folder)
    assert folders.is_whole(folder)
    (folder / name).rename(tmp_path / "moved")
    (folder / name).symlink_to(tmp_path / "moved")
    assert not folders.is_whole(folder)


# ---- S14: only regular files are opened --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["trainer/meta.json", "trainer/state.safetensors", "model.safetensors"])
def test_a_checkpoint_that_has_no_end(kind, name, base, tmp_path):
    """It is skipped as a damaged one, and the one before is resumed."""
    flags, run = base
    out = tmp_path / "out"
    shutil.copytree(run, out)
    no_end(out / "checkpoint-000002" / name, kind)
    checkpoint, error = prepared("sft", out, *flags, "--resume", "auto")
    assert (checkpoint, error) == ("checkpoint-000001", None)


def no_end(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


def with_model(folder, kind, name):
    shutil.copytree(MODEL, folder / "model")
    (folder / "model" / name).parent.mkdir(exist_ok=True)
    no_end(folder / "model" / name, kind)
    return "sft", ["--model", folder / "model"]


def with_rows(folder, kind, name):
    (folder / name).parent.mkdir(exist_ok=True)
    no_end(folder / name, kind)
    return "sft", ["--dataset", folder / Path(name).parts[0]]


def saved_rows(folder, kind, name):
    import datasets

    datasets.Dataset.from_list([{"text": "a b"}] * 4).save_to_disk(folder / "saved")
    no_end(folder / "saved" / name, kind)
    return "sft", ["--dataset", folder / "saved"]


def with_template(folder, kind, name):
    no_end(folder / name, kind)
    return "sft", ["--chat_template", folder / name]


def with_reward(folder, kind, name):
    no_end(folder / name, kind)
    return "grpo", ["--reward", f"{folder / name}:f"]


def with_reward_model(folder, kind, name):
    return "grpo", ["--reward", with_model(folder, kind, name)[1][1]]


def with_output(folder, kind, name):
    (folder / "out").mkdir()
    no_end(folder / "out" / name, kind)
    return "sft", ["--resume", "auto"]


ENDLESS = {
    "rows": (with_rows, "rows.jsonl"), "zipped rows": (with_rows, "rows.jsonl.gz"),
    "a table": (with_rows, "rows.parquet"), "rows in a folder": (with_rows, "data/train.jsonl"),
    "a saved data set": (saved_rows, "data-00000-of-00001.arrow"),
    "what is said of it": (saved_rows, "dataset_info.json"),
    "a config": (with_model, "config.json"), "weights": (with_model, "model.safetensors"),
    "a tokenizer": (with_model, "tokenizer.json"),
    "one more template": (with_model, "additional_chat_templates/tool_use.jinja"),
    "a template": (with_template, "x.jinja"), "a reward file": (with_reward, "x.py"),
    "a reward model": (with_reward_model, "config.json"),
    "run.json": (with_output, "run.json"), "a log": (with_output, "metrics.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", pytest.param("device", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ENDLESS)
def test_what_has_no_end_is_not_read(case, kind, tmp_path):
    """One line, within seconds: a pipe whose other end nobody has, and a device behind a link."""
    make, name = ENDLESS[case]
    method, flags = make(tmp_path, kind, name)
    began = time.monotonic()
    refused(command(method, tmp_path / "out", "--max_steps", 1, *flags), Path(name).name)
    assert time.monotonic() - began < 20  # two seconds alone; a hang is a minute's


def test_a_signal_while_checkpoints_are_read(base, tmp_path):
    """A file of a terabyte, of which no byte is on the disk: reading it takes minutes, and SIGTERM is heard at once."""
    flags, run = base
    out = tmp_path / "out"
    shutil.copytree(run, out)
    os.truncate(out / "checkpoint-000002" / "model.safetensors", 2**40)
    worker = command("sft", out, *flags, "--resume", "auto")
    while worker.is_alive() and not (out / "run.lock").read_text().startswith(f"process {worker.pid} "):
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(worker.pid, signal.SIGTERM)
    began = time.monotonic()
    code, text = ended(worker)
    assert code == 4 and "SIGTERM was heard" in text and time.monotonic() - began < 10, text[-2000:]


# ---- W10: a forged meta.json -------------------------------------------------------------------------------------

FORGED = {
    "a negative step": {"step": -3}, "a step that is far away": {"step": 10**15}, "another step": {"step": 1},
    "a step that is true": {"step": True}, "alerts": {"state": {"alerts": 3}}, "before": {"state": {"before": 3}},
    "a list": {"state": {"before": [], "last": []}}, "a text": {"state": {"before": {"a": "x"}, "last": {"a": "x"}}},
    "last alone": {"state": {"last": {"eval/loss": 1.0}}}, "best": {"state": {"best": {}}},
    "the best": {"state": {"best": {"accuracy": None, "step": 1}}}, "counts": {"state": {"alerts": {"DATA001": "x"}}},
    "an offset": {"offsets": {"metrics.jsonl": "x"}}, "a negative one": {"offsets": {"metrics.jsonl": -1}},
    "half of one": {"offsets": {"metrics.jsonl": 1.5}}, "no offset": {"offsets": {"metrics.jsonl": None}},
    "no files": {"crc32": {}}, "files elsewhere": {"crc32": {"../checkpoint-000001/config.json": 0}},
    "flags": {"flags": {"batch_size": "x"}}, "no flags": {"flags": {}},
}  # fmt: skip


def sign(folder, change=None):
    """Change meta.json and make all of its checksums right."""
    path = folder / "trainer" / "meta.json"
    about = json.loads(path.read_text())
    del about["own_crc32"]
    for name in about["crc32"]:
        about["crc32"][name] = zlib.crc32((folder / name).read_bytes())
    about |= change or {}
    path.write_text(json.dumps(about | {"own_crc32": zlib.crc32(json.dumps(about).encode())}))


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_meta_is_a_damaged_checkpoint(case, base, tmp_path):
    folder = tmp_path / "checkpoint-000002"
    shutil.copytree(base[1] / "checkpoint-000002", folder)
    sign(folder)
    assert folders.is_whole(folder)
    sign(folder, FORGED[case])
    assert not folders.is_whole(folder)


@pytest.mark.parametrize("name", ["no_slash", "alerts/more", None])
def test_a_forged_state_is_a_damaged_checkpoint(name, base, tmp_path):
    folder = tmp_path / "checkpoint-000002"
    shutil.copytree(base[1] / "checkpoint-000002", folder)
    path = folder / "trainer" / "state.safetensors"
    tensors = load_file(path)
    if name is None:
        path.write_bytes(b"no tensors")
    else:
        some = next(iter(load_file(folder / "model.safetensors").values()))
        save_file({**tensors, name: some}, path)
    sign(folder)
    assert not folders.is_whole(folder)


def test_a_forged_checkpoint_is_skipped(base, tmp_path):
    """With --allow_changes, which once let it through."""
    flags, run = base
    out = tmp_path / "out"
    shutil.copytree(run, out)
    sign(out / "checkpoint-000002", {"step": -3, "offsets": {"metrics.jsonl": "x"}, "state": {"before": 3}})
    code, text = ended(command("sft", out, *flags, "--resume", "auto", "--allow_changes"))
    assert code == 0 and "checkpoint-000002: damaged" in text and "Traceback" not in text, text[-2000:]
    assert "checkpoint-000001\n" in text.partition("resumed")[2]
    assert (out / "checkpoint-000002" / "model.safetensors").read_bytes() == (
        run / "checkpoint-000002" / "model.safetensors").read_bytes()


# ---- W11, W13 ----------------------------------------------------------------------------------------------------


def test_linked_checkpoints_rotate(base, tmp_path):
    """Checkpoints that were moved to another disk: resumed from there, and of those that go the link goes."""
    flags, run = base
    out = tmp_path / "out"
    shutil.copytree(run, out)
    for name in "checkpoint-000001", "checkpoint-000002":
        (out / name).rename(tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
    before = contents(tmp_path / "checkpoint-000001"), contents(tmp_path / "checkpoint-000002")
    more = ["--resume", "auto", "--keep_last", 1, "--max_steps", 3, "--allow_changes"]
    code, text = ended(command("sft", out, *flags, *more))
    assert code == 0 and "resumed" in text, text[-2000:]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-000003"] and not list(out.glob(".old-*"))
    assert before == (contents(tmp_path / "checkpoint-000001"), contents(tmp_path / "checkpoint-000002"))


def test_files_follow_the_umask(base):
    """A server under another user of the group has to read the weights, too."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in base[1].rglob("*") if path.is_file()}
    assert len(modes) > 20 and not [path for path, mode in modes.items() if mode != 0o666 & ~UMASK]
