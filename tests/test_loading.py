"""Models are made without memory, then every rank reads its own slices; saved again, they are files of bounded size.
The oracle is `from_pretrained` of the same folder, in one process, and the names in the folder's own files."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT, ranks, script, tiny_flags, tiny_rows, train, try_ranks
from safetensors import safe_open
from test_logprobs import build
from transformers import AutoModelForCausalLM

from common.runtime import checkpoint, model
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
    lm = build(name, **MODELS[name])
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
    args.replicate_size, checkpoint.FILE_BYTES = replicate, size
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
    checkpoint.export(run, policy, path / "export")
    dist.barrier()
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    weights = {name: full(p).detach() for name, p in lm.named_parameters()}
    return weights, state(lm.named_buffers()), tied, len(broadcasts)


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
