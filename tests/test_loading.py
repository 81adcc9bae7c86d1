"""Models are made without memory, then every rank reads its own slices; saved again, they are files of bounded size.
The oracle is `from_pretrained` of the same folder, in one process, and the names in the folder's own files."""
import json
import os
from array import array
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT, ranks, read_jsonl, script, tiny_flags, tiny_rows, train, try_ranks, try_train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_logprobs import build
from transformers import AutoModelForCausalLM

from common.batches import flat_batch
from common.runtime import checkpoint, export, model
from common.runtime.launch import launch
from common.runtime.parallel import full

ROTARY = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                              "original_max_position_embeddings": 64}}  # fmt: skip
MODELS = {  # what each is for
    "Llama tied": {"tie_word_embeddings": True},
    "Llama yarn": ROTARY,  # buffers that only transformers' own code computes right
    "Gemma3Text": {},  # two rotary tables, a scaled embedding, tied
    "Qwen3Moe": {},  # stored expert by expert, held fused: read by rank 0 and broadcast
    "DeepseekV3": {},  # a persistent buffer
    "Phi": {},  # biases, also of the head
}


def folder(name, path, **how):
    lm = build(name, vocab_size=112, **MODELS[name])  # of them the tokenizer knows 103
    for module in lm.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.normal_()
    lm.save_pretrained(path, **how)
    for file in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja":
        (path / file).write_bytes((ROOT / "common/tiny/model" / file).read_bytes())
    return path


def state(tensors):
    return {name: tensor.clone() for name, tensor in tensors if tensor is not None}


def load(rank, world, path, replicate, tp, size):
    """The script's own road from a folder to a sharded policy -> its tensors whole, is it tied, how it was read."""
    module = script("sft")
    args = module.parse_args([*tiny_flags("sft"), "--model", str(path), "--tp_size", str(tp)])
    shape = replicate, world // (replicate * tp), tp
    mesh = module.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
    run = SimpleNamespace(args=args, mesh=mesh, device=torch.device("cpu"), world=world, rank=rank, weights=0)
    run.dtype, run.group = torch.float32, dist.group.WORLD
    args.replicate_size, export.FILE_BYTES = replicate, size
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    broadcasts = []
    agree = model.agree  # that rank 0 could read the whole model, before it is broadcast
    model.agree = lambda *args: broadcasts.append(1) or agree(*args)
    policy = model.load_weights(run, module.shard(module.Policy(lm), run))
    if rank == 0:
        (path / "export").mkdir()
    dist.barrier()
    export.export(run, policy, path / "export")
    dist.barrier()
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    weights = {name: full(p).detach() for name, p in lm.named_parameters()}
    buffers = [(name, full(buffer)) for name, buffer in lm.named_buffers()]  # tp makes those of an embedding DTensors
    return weights, state(buffers), tied, len(broadcasts)


def names(path):
    return {key: safe_open(file, "pt").get_tensor(key) for file in sorted(path.glob("*.safetensors"))
            for key in safe_open(file, "pt").keys()}


@pytest.mark.parametrize("world, replicate, tp, size", [(1, 1, 1, 2**32), (2, 1, 1, 2**14), (4, 2, 2, 2**14)])
@pytest.mark.parametrize("name", MODELS)
def test_loads_and_saves_what_transformers_would(name, world, replicate, tp, size, tmp_path):
    if tp > 1 and name in ("Qwen3Moe", "DeepseekV3", "Phi"):
        tp, replicate = 1, 2
    path = folder(name, tmp_path / "model", max_shard_size="60KB" if world == 2 else "1GB")
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for weights, buffers, tied, broadcasts in ranks(world, load, path, replicate, tp, size):
        assert weights.keys() == dict(lm.named_parameters()).keys()
        assert all(torch.equal(weights[key], p) for key, p in lm.named_parameters())
        assert all(torch.equal(buffers[key], b) for key, b in state(lm.named_buffers()).items())
        assert tied == (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight)
        assert broadcasts == (name in ("Qwen3Moe", "DeepseekV3"))
    stored, export = names(path), path / "export"
    again = names(export)
    assert stored.keys() == again.keys() and all(torch.equal(stored[key], again[key]) for key in stored)
    files = sorted(export.glob("*.safetensors"))
    assert (len(files) > 3) == (size == 2**14) and not list(export.glob("part-*"))
    if len(files) > 1:
        index = json.loads((export / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == stored.keys() and set(index.values()) == {file.name for file in files}
        layer = max(sum(p.numel() for p in module.parameters()) * 4 for module in lm.base_model.layers)
        assert max(file.stat().st_size for file in files) < size + layer + 10_000
    reloaded = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(lm.state_dict().values(), reloaded.state_dict().values(), strict=True))


# ---- which files -----------------------------------------------------------------------------------------------------


def other(path, target):
    """The tensors of some files under the same names, all wrong."""
    save_file({key: torch.full_like(tensor, 0.5) for key, tensor in names(path).items()}, target, {"format": "pt"})


def more_files(kind, path):
    """A model folder with more than the model's files, as downloads, merges and second saves leave them."""
    folder("Phi", path, max_shard_size="60KB" if "shards" in kind else "1GB")
    if kind == "a variant":
        other(path, path / "model.fp16.safetensors")
    elif kind == "consolidated, and listed before":
        other(path, path / "a_consolidated.safetensors")
        other(path, path / "consolidated.safetensors")
    elif kind == "old shards":  # of a save with more files
        other(path, path / "model-00009-of-00009.safetensors")
    elif kind == "one file beside shards":  # transformers prefers it
        other(path, path / "model.safetensors")
    elif kind == "a name in the config":
        other(path, path / "trained.safetensors")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"transformers_weights": "trained.safetensors"}))
    return path


KINDS = ("a variant", "consolidated, and listed before", "old shards", "one file beside shards", "a name in the config")


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_that_transformers_reads(kind, tmp_path):
    path = more_files(kind, tmp_path / "model")
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for weights, _, _, broadcasts in ranks(2, load, path, 1, 1, 2**32):
        assert all(torch.equal(weights[key], p) for key, p in lm.named_parameters()) and not broadcasts


def refusal(path, *flags):
    (result,) = try_ranks(1, starts, ["--model", str(path), "--output_dir", f"{path}-run", *flags])
    lines = [line for line in result.log.splitlines() if line.startswith("error:")]
    assert result.code == 2 and len(lines) == 1 and "Traceback" not in result.log, result.log
    return lines[0]


def starts(rank, world, argv):
    module = script("sft")
    launch(module.main, module.parse_args([*tiny_flags("sft"), *argv]), module.__file__)
    os._exit(0)  # launch has left the process group


def test_no_weights_or_an_adapter(tmp_path):
    """One line names what was looked for."""
    path = folder("Phi", tmp_path / "model")
    (path / "model.safetensors").rename(path / "consolidated.safetensors")
    line = refusal(path)
    assert "model.safetensors" in line and "model.safetensors.index.json" in line
    path = folder("Phi", tmp_path / "adapted")
    (path / "adapter_config.json").write_text("{}")
    assert "merge" in refusal(path)


@pytest.mark.parametrize("sharded", (False, True))
def test_a_hub_id_downloads_only_what_is_read(sharded, tmp_path, monkeypatch):
    path = folder("Phi", tmp_path / "hub", max_shard_size="60KB" if sharded else "1GB")
    for file in "consolidated.safetensors", "model.fp16.safetensors", "onnx/model.safetensors", "pytorch_model.bin":
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_bytes(b"x")

    def download(name, allow_patterns, revision=None, dry_run=False):
        if dry_run:
            return []  # all of it is in the cache
        assert name == "someone/model" and revision in (None, "0123abc")
        target = tmp_path / "snapshots" / "0123abc"
        for file in [file for file in path.rglob("*") if file.is_file()]:
            relative = file.relative_to(path)
            if any(fnmatch(str(relative), pattern) for pattern in allow_patterns):
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                (target / relative).write_bytes(file.read_bytes())
        return str(target)

    monkeypatch.setattr(model, "snapshot_download", download)
    found = Path(model.model_folder("someone/model"))
    weights = {file.name for file in path.glob("model*.safetensors")} - {"model.fp16.safetensors"}
    downloaded = {str(file.relative_to(found)) for file in found.rglob("*") if file.suffix in (".safetensors", ".bin")}
    assert downloaded == weights
    assert (found / "tokenizer.json").is_file() and len(weights) == 1 or sharded


# ---- ties ------------------------------------------------------------------------------------------------------------


def with_head(path, change):
    """A tied model whose file has a head of its own."""
    folder("Llama tied", path)
    tensors = names(path)
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"].clone())
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def load_all(rank, world, path):
    """The road of a script from load_model on -> the log-probs of a text, the head's tie, config, and the export's."""
    module = script("sft")
    args = module.parse_args([*tiny_flags("sft"), "--model", str(path)])
    mesh = module.init_device_mesh("cpu", (1, world, 1), mesh_dim_names=("replicate", "shard", "tp"))
    run = SimpleNamespace(args=args, mesh=mesh, device=torch.device("cpu"), world=world, rank=rank, weights=0)
    run.dtype, run.group = torch.float32, dist.group.WORLD
    _, lm = model.load_model(AutoModelForCausalLM, args)
    policy = model.load_weights(run, module.shard(module.Policy(lm), run))
    groups = [{"prompt": array("i", range(5)), "completions": [{"ids": array("i", range(5, 25)), "scored": None}]}]
    with torch.no_grad():
        logprobs = policy(flat_batch(groups, run.device))["logprobs"]
    if rank == 0:
        (path / "export").mkdir()
    dist.barrier()
    export.export(run, policy, path / "export")
    dist.barrier()
    return logprobs, lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


@pytest.mark.parametrize("change, tied", ((torch.neg, False), (torch.clone, True)))
def test_a_head_that_differs_is_its_own(change, tied, tmp_path):
    """The config says tied, the file has both: transformers ties only what is equal."""
    path = with_head(tmp_path / "model", change)
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = lm(torch.arange(25)[None]).logits.log_softmax(-1)[0, 4:-1].gather(1, torch.arange(5, 25)[:, None])
    for logprobs, is_tied in ranks(2, load_all, path):
        assert is_tied == tied and torch.allclose(logprobs, expected[:, 0], atol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(path / "export", dtype=torch.float32)
    assert again.config.tie_word_embeddings == tied  # so that every reader, not only transformers, does the same
    assert all(torch.equal(a, b) for a, b in zip(lm.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_head_that_differs_under_other_names(tmp_path):
    """Where rank 0 reads the whole model, the names of the file say nothing about the tie."""
    path = with_head(tmp_path / "model", torch.neg)
    tensors = {key.removeprefix("model."): tensor for key, tensor in names(path).items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert "tie_word_embeddings" in refusal(path)


# ---- positions -------------------------------------------------------------------------------------------------------


def rows_of(count, path):
    path.write_text(json.dumps({"text": "12 + 34 = " * count}) + "\n")
    return str(path)


@pytest.mark.parametrize("name, change", (("GPT2", {"n_positions": 40}), ("OPT", {"max_position_embeddings": 40})))
def test_rows_beyond_a_position_table_are_refused(name, change, tmp_path):
    """Training's and held-out ones, before step 1; those that fit are trained."""
    path = tmp_path / "model"
    shape = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    shape |= {"word_embed_proj_dim": 32, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**shape, **change)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for file in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja":
        (path / file).write_bytes((ROOT / "common/tiny/model" / file).read_bytes())
    short, long = rows_of(1, tmp_path / "short.jsonl"), rows_of(20, tmp_path / "long.jsonl")
    for flags in (["--dataset", long, "--eval_dataset", ""], ["--dataset", short, "--eval_dataset", long]):
        line = refusal(path, *flags, "--max_steps", "1", "--batch_size", "1")
        assert "40 positions" in line and "--max_length 40" in line
    flags = ["--model", str(path), "--dataset", short, "--eval_dataset", "", "--max_steps", "1", "--batch_size", "1",
             "--output_dir", str(tmp_path / "run"), "--max_length", "1024"]  # fmt: skip
    (result,) = try_ranks(1, starts, flags)
    assert result.code == 0 and (tmp_path / "run" / "final").is_dir(), result.log


def test_rows_beyond_max_position_embeddings_are_said(tmp_path):
    path = folder("Phi", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 50}))
    for count, alerts in (20, ["MODEL002"]), (2, []):
        out = tmp_path / f"run{count}"
        flags = ["--dataset", rows_of(count, tmp_path / "rows.jsonl"), "--eval_dataset", "", "--max_steps", 1]
        train("sft", out, "--model", path, *flags, "--batch_size", 1, "--max_length", 1000)
        found = [(alert["code"], alert["level"], alert["limit"]) for alert in read_jsonl(out / "alerts.jsonl")]
        assert [alert for alert in found if alert[0] == "MODEL002"] == [(code, "warn", 50) for code in alerts]


# ---- large models ----------------------------------------------------------------------------------------------------


def large(change=lambda folder: None):
    """Every model is too large to be loaded twice, and after each save `change` meddles with the written folder."""

    def patch(_module):
        write = checkpoint.write_checkpoint

        def spoiled(run, step, folder, *more):
            write(run, step, folder, *more)
            if run.rank == 0:
                change(folder)
            dist.barrier()

        checkpoint.RELOADED, export.RELOADED, export.FILE_BYTES = 0, 0, 2**16
        checkpoint.write_checkpoint = spoiled

    return patch


def flip_weight(folder):
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 0.5
    save_file(tensors, file, {"format": "pt"})


def lose_weight(folder):
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, {"format": "pt"})


def untie(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": not config["tie_word_embeddings"]}))


@pytest.mark.parametrize("change", (flip_weight, lose_weight, untie))
def test_a_large_model_that_was_saved_wrong(change, tmp_path):
    flags = ["--dataset", tiny_rows("sft", tmp_path / "rows.jsonl", 4), "--batch_size", 2, "--max_steps", 1]
    for result in try_train("sft", tmp_path / "run", *flags, world=2, patch=large(change)):
        assert result.code == 1 and "HealthError: CKPT001" in result.error, result.log


def test_the_practice_save_of_a_large_model_is_one_file(tmp_path):
    """Of 70B weights a whole checkpoint is a terabyte. The last save, and what is published, is whole."""

    def note(folder):
        with open(tmp_path / "saves", "a") as file:
            file.write(f"{len(list(folder.glob('*.safetensors')))} {len(list(folder.glob('trainer/shard*')))}\n")

    flags = ["--dataset", tiny_rows("sft", tmp_path / "rows.jsonl", 4), "--batch_size", 2, "--max_steps", 1]
    train("sft", tmp_path / "run", *flags, world=2, patch=large(note))
    practice, last = [tuple(map(int, line.split())) for line in (tmp_path / "saves").read_text().splitlines()]
    assert practice == (1, 0)
    assert last[0] > 1 and last[1] == 2
    assert len(list((tmp_path / "run" / "final").glob("*.safetensors"))) == last[0]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_large_model_that_was_saved_right(dtype, tmp_path):
    """Experts, which are stored under other names and layouts than they are held."""
    path = folder("Qwen3Moe", tmp_path / "model")
    flags = ["--dataset", tiny_rows("sft", tmp_path / "rows.jsonl", 4), "--batch_size", 2, "--max_steps", 1]
    flags += ["--model", path, "--save_dtype", dtype]
    first, _ = try_train("sft", tmp_path / "run", *flags, world=2, patch=large())
    assert first.code == 0 and (tmp_path / "run" / "final").is_dir(), first.log
    assert "CKPT001" not in first.log and "sample    left out" in first.log


def runs_out(rank, world, argv, error):
    module = script("sft")

    def loss(*args):
        raise error

    module.sft_loss = loss
    launch(module.main, module.parse_args(argv), module.__file__)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])  # fmt: skip
def test_out_of_memory_names_the_largest_term(error, tmp_path):
    rows = tiny_rows("sft", tmp_path / "rows.jsonl", 6)
    argv = [*tiny_flags("sft"), "--dataset", rows, "--batch_size", "2", "--output_dir", str(tmp_path / "run")]
    (result,) = try_ranks(1, runs_out, [*argv, "--tokens_per_microbatch", "900"], error)
    (line,) = [line for line in result.log.splitlines() if line.startswith("error:")]
    assert result.code == 2 and "Traceback" not in result.log
    assert "out of memory: step 1 computes with" in line and "Lower --tokens_per_microbatch to 450" in line


def test_deterministic_reruns_are_bitwise(tmp_path):
    flags = ["--dataset", tiny_rows("sft", tmp_path / "rows.jsonl", 6), "--batch_size", 2, "--max_steps", 3]
    for name in "a", "b":
        train("sft", tmp_path / name, *flags, "--deterministic", world=2)
    first, second = (names(tmp_path / name / "final") for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)
