"""
Real 1-, 2- and 4-process runs beside what plan.py predicts for them: `python benchmarks/plan.py --validate`.

Every rank runs the script's own main for a step, watched as plan.py watches its fake ranks. The predictions are made
from the same flags: the script's own rows, order, shares and micro-batches.
"""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import plan
from conftest import FAST, ranks, script, tiny_rows
from plan import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from common.batches import micro_batches, order, share
from common.runtime.launch import setup
from common.runtime.model import load_model
from common.runtime.run import peak_bytes
from common.tokenization import stop_ids

def measured(rank, world, name, argv):
    """The script's own main for one step -> the same figures from this process."""
    module, found = script(name), {}
    shard, partial_parameters, save_or_stop = module.shard, module.partial_parameters, module.save_or_stop

    def watched(policy, run):
        policy = shard(policy, run)
        found["watch"] = plan.Watch(policy, run)
        return policy

    def counted(policy):  # the first thing that main asks for after the last backward
        found["watch"].stop()
        found["parameters"] = plan.local_bytes(policy.parameters())
        found["gradients"] = plan.local_bytes(p.grad for p in policy.parameters())
        return partial_parameters(policy)

    def saved(run, step, steps, models, optimizers, tokenizer):
        states = optimizers["policy"].state.values()
        found["optimizer"] = plan.local_bytes(t for state in states for t in state.values())
        save_or_stop(run, step, steps, models, optimizers, tokenizer)

    module.shard, module.partial_parameters, module.save_or_stop = watched, counted, saved
    args = module.parse_args(argv)
    module.main(args, setup(args, module.__file__))
    return summary(found, found.pop("watch")) | {"process": peak_bytes()}


def summary(found, watch):
    working = watch.peak - max(watch.activations[1:])  # of the micro-batches that were watched
    return found | {"activations": max(watch.activations), "working": working, "moved": dict(watch.traffic)}


def predicted(rank, world, name, argv):
    module = script(name)
    args = module.parse_args(argv)
    with plan.fake_world(module, rank, world, args.tp_size, args.replicate_size) as run:
        run.args = args
        tokenizer, lm = load_model(AutoModelForCausalLM, args)
        stops = stop_ids(tokenizer, lm.generation_config)
        alone = SimpleNamespace(**{**vars(run), "rank": 0, "world": 1})  # what a fake world gathers is nothing
        groups = module.load_groups(args.dataset, tokenizer, stops, args, alone)[0]
        chosen = [groups[i] for i in order(len(groups), args.seed, 0, args.batch_size)]
        batches = list(micro_batches(run, share(run, chosen), spare=groups[0]))
        policy = plan.sharded(module, lm, run, gpu=False)
        found = plan.static(policy)
        return summary(found, plan.step(policy, batches, run, gpu=False))


SMALL = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
         "intermediate_size": 256, "vocab_size": 104, "eos_token_id": 2, "bos_token_id": None}
SMALL_MODELS = {
    "Qwen3 tied": ("qwen3", {"tie_word_embeddings": True}), "Llama untied": ("llama", {"tie_word_embeddings": False}),
    "Qwen3Moe": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
}  # fmt: skip
CASES = (  # script, model, ranks, replicate_size, tp_size
    ("sft", "Qwen3 tied", 1, 1, 1), ("sft", "Llama untied", 2, 1, 1), ("sft", "Qwen3 tied", 2, 1, 2),
    ("sft", "Qwen3Moe", 2, 1, 1), ("sft", "Llama untied", 4, 1, 1), ("sft", "Qwen3 tied", 4, 2, 1),
    ("sft", "Llama untied", 4, 1, 2), ("sft", "Qwen3Moe", 4, 1, 1), ("dpo", "Llama untied", 1, 1, 1),
    ("dpo", "Qwen3 tied", 2, 1, 1), ("dpo", "Qwen3 tied", 4, 1, 2),
)  # fmt: skip


def validate(name, model, world, replicate, tp):
    """-> both sides of one case, on every rank."""
    folder, kind = Path(tempfile.mkdtemp()), SMALL_MODELS[model]
    config = AutoConfig.for_model(kind[0], **{**SMALL, **kind[1]})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for file in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja":
        shutil.copy(ROOT / "common/tiny/model" / file, folder / "model" / file)
    argv = ["--model", folder / "model", "--dataset", tiny_rows(name, folder / "rows.jsonl", 16), "--batch_size", 16]
    argv += ["--max_steps", 1, "--eval_every", 0, "--output_dir", folder / "out", "--tp_size", tp]
    argv += ["--activation_checkpointing", "off"]  # on and auto compute more than the step
    argv += ["--replicate_size", replicate, "--tokens_per_microbatch", 16 * FAST[name]["micro"] * tp // world // 2]
    argv = tuple(map(str, argv))
    real = ranks(world, measured, name, argv)
    print(name, model, world, replicate, tp, flush=True)
    sides = {"measured": real, "predicted": [plan.apart(predicted, rank, world, name, argv) for rank in range(world)]}
    shutil.rmtree(folder)
    return {"script": name, "model": model, "ranks": world, "replicate_size": replicate, "tp_size": tp} | sides
