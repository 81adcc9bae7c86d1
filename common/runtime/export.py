"""The exported model: a Hugging Face folder with names and layouts as transformers stores them, and a look whether it
loads again as what was trained."""

import copy
import json
import re
import time
from itertools import groupby, islice

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from common.batches import flat_batch, probe_groups
from common.runtime.flags import HealthError
from common.runtime.folders import write_tensors
from common.runtime.health import check, spread_gap
from common.runtime.model import own_tensors
from common.runtime.parallel import all_most, full

FILE_BYTES = 2**32  # of weights in one file of an exported model, before the layer that exceeds it
RELOADED = 250e6  # weights, 1 GB in fp32, up to which a saved model is loaded again to be compared


def export(run, policy, folder, most_files=None):
    """Write the Hugging Face files, with names and layouts as transformers stores them. Rank 0 writes the weights, in
    files of whole layers, and never holds more than one file. most_files: no more of them than these."""
    dtype = getattr(torch, run.args.save_dtype)
    places = {}
    for file, tensors in islice(exported_files(run, policy), most_files):
        run.beat = time.monotonic()
        if run.rank == 0:
            write_tensors(tensors, folder / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(tensors, file))
    if run.rank == 0:
        if len(set(places.values())) > 1:
            index = json.dumps({"metadata": {}, "weight_map": places}, indent=1)
            (folder / "model.safetensors.index.json").write_text(index)
        config = copy.deepcopy(policy.lm.config)  # the live one must go on naming the attention we train with
        config.dtype = dtype
        config.architectures = [type(policy.lm).__name__]
        config.save_pretrained(folder)
        policy.lm.generation_config.save_pretrained(folder)


def export_tokenizer(tokenizer, folder):
    """Write the tokenizer, with the chat templates that rows are rendered in (with tools, without) and no others."""
    exported = copy.copy(tokenizer)
    if isinstance(tokenizer.chat_template, dict):
        names = sorted(tokenizer.chat_template.keys() & {"default", "tool_use"})
        exported.chat_template = {name: tokenizer.chat_template[name] for name in names}
    exported.save_pretrained(folder)


def forget_code(folder):
    """Take the addresses of code out of the exported configs. It was not run here, and whoever serves the model with
    trust_remote_code would run what stands there by then."""
    for path in folder.glob("*config.json"):
        config = json.loads(path.read_text(), object_pairs_hook=without_code)
        path.write_text(json.dumps(config, indent=2) + "\n")


def without_code(pairs):
    return {name: value for name, value in pairs if name not in ("auto_map", "custom_pipelines")}


def exported_files(run, policy):
    """Yield the name of each file of an exported model and its tensors, which only rank 0 has: one file at a time."""
    weights = own_tensors(policy.lm)
    files = plan_files(weights, getattr(torch, run.args.save_dtype).itemsize)
    for number, names in enumerate(files, 1):
        tensors = {}
        for name in names:
            tensor = full(weights[name]).detach()  # all ranks take part
            if not tensor.isfinite().all():
                raise HealthError("TRAIN001: weights that are not finite are not saved. Lower --learning_rate.")
            if run.rank == 0:
                tensors[name] = tensor.to("cpu", getattr(torch, run.args.save_dtype))
        tensors = revert_weight_conversion(policy.lm, tensors) if run.rank == 0 else {}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        yield f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors", tensors


def plan_files(weights, itemsize):
    """Return the names of the tensors of each file. A file ends with the layer that brings it to FILE_BYTES."""
    files, size = [], FILE_BYTES
    for _, layer in groupby(weights, key=lambda name: re.match(r"(.*?\.\d+\.)?", name)[0]):
        if size >= FILE_BYTES:
            files.append([])
            size = 0
        for name in layer:
            files[-1].append(name)
            size += weights[name].numel() * itemsize
    return files


@torch.no_grad()
def check_export(run, policy, tokenizer, folder, most_files=None):
    """CKPT001: a saved folder loads with the policy's auto class, tied weights are tied, every weight is as we hold it
    (in save_dtype), and the model says what the policy says. Return the loaded model on rank 0, else None. A model
    of more than RELOADED weights is not loaded: its files are compared one by one."""
    text = f"{folder.name} does not reload as the model in training: keep the checkpoint before it"
    metric = "keys, ties or weights differ"
    if run.weights > RELOADED:
        equal = files_are_equal(run, policy, folder, most_files)
        check(run, "CKPT001", step=run.step, metric=metric, value=not equal, message=text, error=0)
        return None
    dtype = getattr(torch, run.args.save_dtype)
    groups = probe_groups(len(tokenizer))
    trained = policy(flat_batch(groups, run.device))[policy.output].cpu()
    named = policy.lm.named_parameters()
    expected = {name: full(p).to("cpu", dtype).float() for name, p in named}  # all ranks take part
    if run.rank != 0:
        return None
    reloaded = policy.auto_class.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    found = dict(reloaded.named_parameters())
    broken = found.keys() != expected.keys()  # a head that lost its tie has a name of its own
    broken = broken or any(not torch.equal(found[name], expected[name]) for name in found)
    check(run, "CKPT001", step=run.step, metric=metric, value=broken, message=text, error=0)
    if dtype == torch.float32:  # bf16 rounds
        gap = spread_gap(trained, policy.plain_answer(reloaded.eval(), groups))
        metric = f"{policy.output} difference / spread"
        # Every weight is compared above: bfloat16 against fp32 leaves what only a wrong config makes.
        check(run, "CKPT001", step=run.step, metric=metric, value=gap, message=text, error=1e-4, rounding=0.2)
    return reloaded


def files_are_equal(run, policy, folder, most_files):
    """Return whether a saved folder makes a model of our names and ties, and each of its tensors is as we hold it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        lm = policy.auto_class.from_config(config, trust_remote_code=False)
    equal = dict(lm.named_parameters()).keys() == dict(policy.lm.named_parameters()).keys()
    for file, tensors in islice(exported_files(run, policy), most_files):
        run.beat = time.monotonic()
        if run.rank == 0:
            with safe_open(folder / file, "pt") as saved:
                equal = equal and set(saved.keys()) == tensors.keys()
                equal = equal and all(torch.equal(saved.get_tensor(name), tensors[name]) for name in tensors)
    return all_most(run, not equal) == 0  # rank 0 has compared; all ranks must decide alike
