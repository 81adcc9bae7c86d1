"""How much memory and time it takes to get a model into its shards: every rank reads its slices, or rank 0 reads the
model and broadcasts it. Both are roads of load_weights, which every script calls.

    python benchmarks/loading.py [--ranks 1 2 4] [--rounds 3] [--layers 12] [--hidden 1024] [--out FILE.json]

A random Llama in bf16 is written to a temporary folder; every case is a fresh process group of fresh processes, slices
and broadcast in turn. Memory: how far the resident set of a rank rises while it loads (Linux), pages of mapped files
included; shard: what it ends with, fp32.
"""
import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU is what this is about
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def memory(field):
    """Bytes that /proc says of this process. VmRSS: resident now; VmHWM: the most since 5 was written to clear_refs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def one(rank, world, folder, store, road, results):
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = importlib.util.spec_from_file_location("sft", ROOT / "methods" / "sft.py")
    sft = importlib.util.module_from_spec(spec)
    sys.modules["sft"] = sft
    spec.loader.exec_module(sft)
    from common.runtime.model import load_weights
    from common.runtime.parallel import local

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = sft.init_device_mesh("cpu", (1, world, 1), mesh_dim_names=("replicate", "shard", "tp"))
    args = SimpleNamespace(tp_size=1, replicate_size=1, cpu_offload=False, model=folder, seed=0)
    run = SimpleNamespace(args=args, mesh=mesh, device=torch.device("cpu"), dtype=torch.float32, rank=rank, world=world,
                          weights=0)
    run.group = dist.group.WORLD
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    policy = sft.shard(sft.Policy(lm), run)
    if road == "broadcast":  # as for a folder whose names are not the model's
        HuggingFaceStorageReader.read_metadata = lambda self: SimpleNamespace(state_dict_metadata={})
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # ru_maxrss would be the parent's where that was larger
    before, begun = memory("VmRSS"), time.perf_counter()
    load_weights(run, policy)
    dist.barrier()
    seconds = time.perf_counter() - begun
    shard = sum(local(p).numel() * 4 for p in policy.parameters())
    rise = memory("VmHWM") - before
    results.put({"rank": rank, "seconds": seconds, "peak_gb": rise / 1e9, "shard_gb": shard / 1e9})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "loading.json")
    args = parser.parse_args()
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False,
    )
    rows, fork = [], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lm.save_pretrained(folder)
        weights = sum(p.numel() for p in lm.parameters())
        del lm
        for number in range(args.rounds):
            for world in args.ranks:
                for road in "slices", "broadcast":
                    results, store = fork.Queue(), f"{folder}/store-{number}-{world}-{road}"
                    workers = [fork.Process(target=one, args=(rank, world, folder, store, road, results))
                               for rank in range(world)]
                    for worker in workers:
                        worker.start()
                    rows += [results.get() | {"world": world, "road": road, "round": number} for _ in workers]
                    for worker in workers:
                        worker.join()
    about = {"weights": weights, "torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"device": platform.machine(), "command": f"python benchmarks/loading.py --rounds {args.rounds}"}
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    for world in args.ranks:
        for road in "slices", "broadcast":
            mine = [row for row in rows if (row["world"], row["road"]) == (world, road)]
            first = statistics.median(row["peak_gb"] for row in mine if row["rank"] == 0)
            others = statistics.median(row["peak_gb"] for row in mine if row["rank"] or world == 1)
            seconds = statistics.median(row["seconds"] for row in mine)
            print(f"{world} ranks, {road:<9}  rank 0 {first:.2f} GB, others {others:.2f} GB, shard "
                  f"{mine[0]['shard_gb']:.2f} GB, {seconds:.1f} s")


if __name__ == "__main__":
    main()
