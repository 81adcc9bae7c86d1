"""
What a training step of a script takes on every rank and what it moves, for any model on any number of GPUs.

    python benchmarks/plan.py --model Qwen3-8B --gpus 16 --tp_size 2     one plan (a name, a folder or config.json)
    python benchmarks/plan.py --table                                    the published table
    python benchmarks/plan.py --validate                                 predictions beside real runs (plan_real.py)

The model goes through the script's own `shard` in a fake process group: as many ranks as wanted, no memory. Parameters,
gradients and Adam's moments are those of the whole sharded model. Activations, working memory and collectives come from
the script's own forward and backward of two flat batches on fake tensors, on a GPU's road (bf16, fused attention) and
with a few layers only, of which each further layer repeats the last. --table and --validate write results/plan.jsonl.
"""

import argparse
import json
import multiprocessing
import sys
from array import array
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import torch.distributed as dist
import transformers
from conftest import FAST, ROOT, script
from plan_models import FABRIC, GPUS, MODELS, OFFLINE, TABLE
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # private: the only way without memory
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import moe

from common import attention, logprobs
from common.batches import flat_batch
from common.runtime.checkpoint import trainer_tensors
from common.runtime.flags import InputError
from common.runtime.model import materialize

RESULTS = ROOT / "benchmarks" / "results" / "plan.jsonl"
KINDS = "parameters", "gradients", "optimizer", "activations", "working"
NAMES = {"working": "working memory (gathered layers, head)", "last_rank": "first three on the last rank",
         "layer": "largest layer when gathered", "checkpointed": "activations if every layer were recomputed"}


# ---- model -----------------------------------------------------------------------------------------------------------
def read_config(name, layers=None):
    """-> config of a name in MODELS, a folder or a config.json; layers: with only so many."""
    if name in MODELS:
        numbers = dict(MODELS[name][1])
        config = AutoConfig.for_model(numbers.pop("model_type"), **numbers)
    else:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    text = config.get_text_config()
    if layers:
        text.num_hidden_layers = layers
        text.layer_types = text.layer_types[:layers] if getattr(text, "layer_types", None) else None
    return config


@contextmanager
def fake_world(module, rank, world, tp, replicate):
    """One rank of a group in which every collective succeeds at once. -> what the scripts call run."""
    dist.init_process_group("fake", rank=rank, world_size=world)
    try:
        args = SimpleNamespace(tp_size=tp, replicate_size=replicate, cpu_offload=False)
        shape = replicate, world // (replicate * tp), tp
        mesh = module.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
        yield SimpleNamespace(args=args, mesh=mesh, rank=rank, world=world, device=torch.device("cpu"),
                              dtype=torch.float32, group=dist.group.WORLD, dp_size=world // tp, dp_rank=rank // tp,
                              unread=set(), bar=None, beat=0.0)
    finally:
        dist.destroy_process_group()


def sharded(module, lm, run, gpu):
    """lm, on the meta device, as the script shards it; for a GPU although the mesh is of CPUs."""
    run.device = torch.device("cuda" if gpu else "cpu")
    run.dtype = torch.bfloat16 if gpu else torch.float32
    policy = module.shard(logprobs.Policy(lm), run)
    run.device = torch.device("cpu")
    return policy


def local_bytes(tensors):
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in tensors)


def static(policy):
    """Bytes on this rank of what lives as long as the run: gradients have their parameters' shape and type."""
    optimizer = SimpleNamespace(state={p: {} for p in policy.parameters()})
    trainer_tensors({"policy": policy}, {"policy": optimizer})  # fills the state as AdamW would
    weights = local_bytes(policy.parameters())
    moments = local_bytes(t for state in optimizer.state.values() for t in state.values())
    return {"parameters": weights, "gradients": weights, "optimizer": moments}


# ---- one step --------------------------------------------------------------------------------------------------------
class Watch(TorchDispatchMode):
    """Watches the forward and backward of every micro-batch but the first (which makes FSDP's buffers and the
    gradients) in a fake or a real run. activations: what autograd saved for backward, unique storages, parameters not
    counted, per forward. peak: bytes alive at once beyond parameters and gradients. traffic: bytes that a rank has to
    receive, by mesh dimension and collective, in the least that a ring takes."""

    def __init__(self, policy, run):
        super().__init__()
        self.activations, self.traffic, self.alive, self.peak = [], Counter(), WeakIdKeyDictionary(), 0
        self.groups = {run.mesh[name].get_group().group_name: (name, run.mesh[name].size()) for name in
                       run.mesh.mesh_dim_names}
        self.passes, self.on = 0, False
        policy.register_forward_pre_hook(self.before, prepend=True)  # before FSDP gathers
        policy.register_forward_hook(self.after)  # after it has freed what it gathered

    def before(self, policy, _):
        if torch.is_grad_enabled():
            if self.passes == 1:
                held = [t for p in self.parameters for t in (p, p.grad) if t is not None]
                self.held = {storage(t)._cdata for t in held}
                self.on = bool(self.__enter__())
            self.saved = []
            self.hooks = saved_tensors_hooks(self.pack, lambda t: t)
            self.hooks.__enter__()

    def pack(self, t):
        self.saved.append(storage(t))
        return t

    def after(self, policy, _inputs, _out):
        if torch.is_grad_enabled():
            self.hooks.__exit__(None, None, None)
            self.parameters = list(policy.parameters())
            weights = {storage(p)._cdata for p in self.parameters}
            unique = {s._cdata: s for s in self.saved if s._cdata not in weights}
            self.activations.append(sum(s.nbytes() for s in unique.values()))
            self.passes, self.saved = self.passes + 1, []

    def stop(self):
        if self.on:
            self.on = bool(self.__exit__(None, None, None))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented  # they call again with what they hold
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self.count(func.__name__.split(".")[0], args)
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, torch.Tensor) and (s := storage(t))._cdata not in self.held:
                self.alive[s] = True
        self.peak = max(self.peak, sum(s.nbytes() for s in self.alive.keys()))
        return out

    def count(self, name, args):
        kind = next((k for k in ("all_gather", "reduce_scatter", "all_reduce") if k.replace("_", "") in
                     name.replace("_", "")), None)
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if not kind or tensors[0].dtype == torch.float64:  # a wait or a broadcast; all_sum's few numbers
            return
        names = [a for a in args if isinstance(a, str)]  # functional collectives name their group, others hand it over
        names += [dist.ProcessGroup.unbox(a).group_name for a in args
                  if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
        dim, size = next(self.groups[n] for n in names if n in self.groups)
        most = max(t.numel() * t.element_size() for t in tensors) * (2 if kind == "all_reduce" else 1)
        whole = size if kind == "all_gather" and name[0] != "_" else 1  # a functional one's only tensor is its input
        self.traffic[f"{dim} {kind}"] += most * whole * (size - 1) // size


def storage(t):
    t = t._local_tensor if isinstance(t, DTensor) else t
    return (t.elem if isinstance(t, AsyncCollectiveTensor) else t).untyped_storage()


@contextmanager
def road(batches, gpu):
    """The attention, head chunks and dtypes of a GPU on fake CPU tensors; or the CPU's own, with segments whose lengths
    fake tensors could not tell."""
    lengths = {id(b[name]): b[name].diff().tolist() for b in batches for name in ("cu_seqlens_q", "cu_seqlens_k")}
    chunk, grouped, real_lengths = logprobs.CHUNK["cpu"], moe._can_use_grouped_mm, attention._lengths
    if gpu:
        FakeTensor.is_cuda, logprobs.CHUNK["cpu"] = property(lambda t: True), logprobs.CHUNK["cuda"]
    else:  # the fake kernel takes bf16 only
        moe._can_use_grouped_mm = lambda *_: False
        attention._lengths = lambda cu_seqlens: lengths[id(cu_seqlens)]
    try:
        yield
    finally:
        logprobs.CHUNK["cpu"], moe._can_use_grouped_mm, attention._lengths = chunk, grouped, real_lengths
        if gpu:
            del FakeTensor.is_cuda


def step(policy, batches, run, gpu):
    """Forward and backward of the batches on fake tensors -> Watch."""
    watch = Watch(policy, run)
    with road(batches, gpu), FakeTensorMode(allow_non_fake_inputs=True):
        materialize(policy.lm, "cpu", rope_device="cpu")
        for batch in batches:
            policy(batch)["logprobs"].sum().backward()
        watch.stop()
    return watch


def rows(name, length, tokens):
    """Groups of one micro-batch, of `length` tokens each: half of it the prompt, the rest one completion or, for DPO,
    two."""
    completions = 2 if FAST[name]["data"] == "pairs" else 1
    ids = array("i", [0]) * (length // 2 // completions)
    group = {"prompt": array("i", [0]) * (length // 2), "completions": [{"ids": ids, "scored": None}] * completions}
    return [group] * max(1, tokens // length)


@cache
def apart(function, *args):
    """function(*args) in a process of its own: what torch remembers of one world's meshes spoils the next."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def weightless(model, layers=None):
    """As load_model has it, without its tokenizer."""
    with torch.device("meta"):
        config = read_config(model, layers)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()


def whole_model(name, model, rank, gpus, tp, replicate, gpu):
    """-> static bytes on a rank, parameters, bytes of the largest layer once gathered."""
    with fake_world(script(name), rank, gpus, tp, replicate) as run:
        policy = sharded(script(name), weightless(model), run, gpu)
        layer = max(sum(p.numel() for p in m.parameters()) for m in policy.modules()
                    if isinstance(m, FSDPModule) and m is not policy)
        found = static(policy)
        return found, sum(p.numel() for p in policy.parameters()), layer * (2 if gpu else 4)


def some_layers(name, model, layers, gpus, tp, replicate, tokens, length, gpu):
    """-> activations, peak and traffic of the second of two equal micro-batches."""
    batch = flat_batch(rows(name, length, tokens))
    with fake_world(script(name), 0, gpus, tp, replicate) as run:
        policy = sharded(script(name), weightless(model, layers), run, gpu)
        watch = step(policy, [batch, batch], run, gpu)
        return watch.activations[-1], watch.peak, watch.traffic


def plan(name, model, gpus, tp=1, replicate=1, tokens=8192, length=1024, micro_batches=1, gpu=True, few=2):
    """-> bytes on rank 0, which has the largest shards, and of the static ones on the last; what a step moves."""
    first, numel, layer = apart(whole_model, name, model, 0, gpus, tp, replicate, gpu)
    last = apart(whole_model, name, model, gpus - 1, gpus, tp, replicate, gpu)[0]
    text = read_config(model).get_text_config()
    layers, dense = text.num_hidden_layers, getattr(text, "first_k_dense_replace", 0) or 0
    counts = [min(layers, dense + few), min(layers, dense + few + 1)]
    some = [apart(some_layers, name, model, count, gpus, tp, replicate, tokens, length, gpu) for count in counts]
    (least, _, before), (most, peak, after) = some

    def whole(a, b):  # of all layers, from the two counts
        return b + (b - a) * (layers - counts[1])

    found = {**first, "activations": whole(least, most), "working": peak - most}
    width = tokens * text.hidden_size * (2 if gpu else 4)  # a layer's input
    routed = 4 * width * (getattr(text, "num_experts_per_tok", None) or 0) * (layers - dense)  # there, back; twice
    return {
        "script": name, "model": Path(model).name, "gpus": gpus, "tp_size": tp, "replicate_size": replicate,
        "tokens_per_microbatch": tokens, "length": length, "micro_batches": micro_batches, "weights": numel,
        "layers": layers, "traced": counts, **found, "total": sum(found[k] for k in KINDS),
        "last_rank": sum(last.values()), "layer": layer, "routed": micro_batches * routed,
        "checkpointed": min(found["activations"], layers * width + 2 * (most - least)),
        "moved": {k: micro_batches * whole(before[k], n) for k, n in after.items() if n},
    }


# ---- main ------------------------------------------------------------------------------------------------------------
def fitting(name, model, gpus, tp, replicate):
    """The plan for the smallest GPU with the largest budget of tokens; where no GPU is large enough, the smallest."""
    least = plan(name, model, gpus, tp, replicate, 1024)
    for kind, size in [(kind, size) for kind, size in GPUS.items() if least["total"] <= size]:
        for tokens in (8192, 4096, 2048):
            hopeless = least["total"] + least["activations"] * (tokens / 1024 - 1) > size
            if not hopeless and (found := plan(name, model, gpus, tp, replicate, tokens))["total"] <= size:
                return found | {"fits": kind}
        return least | {"fits": kind}
    return least | {"fits": "none"}


def read_results():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def write(kind, rows):
    """Replace this kind's lines of the results."""
    about = {"kind": kind, "command": " ".join(["python", "benchmarks/plan.py", *sys.argv[1:]]),
             "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    kept = [row for row in read_results() if row["kind"] != kind] + [about | row for row in rows]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in sorted(kept, key=lambda row: row["kind"])))


def show(p):
    print(f"{p['script']} {p['model']}, {p['weights'] / 1e9:.2f}e9 weights, {p['layers']} layers")
    print(f"rank 0 of {p['gpus']}, tp_size {p['tp_size']}, replicate_size {p['replicate_size']}, "
          f"tokens_per_microbatch {p['tokens_per_microbatch']} in rows of {p['length']}")
    fits = ", ".join(kind for kind, size in GPUS.items() if p["total"] <= size) or "none"
    for key in (*KINDS, "total", "last_rank", "layer", "checkpointed"):
        print(f"  {NAMES.get(key, key):<44}{p[key] / 1e9:8.2f} GB{f'   fits: {fits}' if key == 'total' else ''}")
    print(f"received by each rank in a step of {p['micro_batches']} micro-batches, at least so long:")
    for key, n in p["moved"].items():
        print(f"  {key:<44}{n / 1e9:8.2f} GB {n / FABRIC[key.split()[0]]:8.2f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=OFFLINE, default="sft")
    parser.add_argument("--model", help=f"a folder, a config.json or one of {', '.join(MODELS)}")
    for flag, default in (("--gpus", 1), ("--tp_size", 1), ("--replicate_size", 1), ("--tokens_per_microbatch", 8192),
                          ("--length", 1024), ("--micro_batches", 1)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--table", action="store_true", help="all published plans")
    parser.add_argument("--validate", action="store_true", help="predictions beside real runs")
    args = parser.parse_args()
    numbers = args.gpus, args.tp_size, args.replicate_size, args.tokens_per_microbatch, args.length, args.micro_batches
    if min(numbers) < 1 or args.length < 2 or args.gpus % (args.tp_size * args.replicate_size):
        parser.error("numbers are from 1 on (--length from 2), --tp_size x --replicate_size divides --gpus")
    if not (args.model or args.table or args.validate):
        parser.error("--model, --table or --validate is needed")
    if args.validate:
        from plan_real import CASES, validate  # which imports this file

        write("real", [validate(*case) for case in CASES])
    if args.table:
        rows = []
        for name in OFFLINE:
            for case in TABLE:
                rows.append(fitting(name, *case))
                print(name, *case, rows[-1]["tokens_per_microbatch"], rows[-1]["fits"], flush=True)
        write("plan", rows)
    if args.model:
        try:
            show(plan(args.script, args.model, *numbers))
        except (InputError, OSError, ValueError) as e:
            parser.error(f"--model {args.model}: {str(e).splitlines()[0]}")


if __name__ == "__main__":
    main()
