"""What ranks say to each other: sums, agreement on errors, gathered tensors, gradient norms, and tensor parallelism."""

import json
import math
import re

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from common.runtime.flags import InputError

# The styles of a model's own tp_plan, as torch has them. A plan with any other style stops the run.
STYLES = {
    "colwise": ColwiseParallel(),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel(),
    "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": None,  # left whole; the script sums its gradients over the tp ranks
}


# ---- precision -----------------------------------------------------------------------------------
def layer_dtype(args):
    """Return the dtype that --dtype gives the layers of every model. Limits depend on it, never on the device."""
    if args.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, args.dtype)


# ---- exchange ------------------------------------------------------------------------------------
def all_sum(run, *values):
    """Return the values, numbers or tensors of one element, summed over the data-parallel ranks, as floats. tp ranks
    hold the same numbers, which count once. It is the only way a metric leaves its rank."""
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=run.device).detach() for value in values])
    dist.all_reduce(total, group=run.group)
    return (total / run.args.tp_size).tolist()


def all_most(run, value):
    """Return the largest value of any rank, as a float."""
    most = torch.tensor(float(value), dtype=torch.float64, device=run.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=run.group)
    return most.item()


def exchange(value, device, group):
    """Return the values of all ranks of `group`, in rank order. A value is what JSON can hold, and travels as bytes of
    JSON in a tensor: torch's own exchange of objects would run what they hold on the rank that reads them."""
    letters = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    return [json.loads(bytes(part["letters"].tolist())) for part in gather_tensors({"letters": letters}, group)]


def agree(run, error):
    """End the run on all ranks with the text of the first rank that has one; `error` is None where all is well."""
    errors = [error] if run.world == 1 else exchange(error, run.device, run.group)
    for text in errors:
        if text:
            raise InputError(text)


def full(tensor):
    """Return the whole tensor. For a DTensor this is a collective: all ranks must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """Return this rank's part of a DTensor; writing to it writes to the DTensor. Other tensors come back unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_tensors(tensors, group):
    """Return the dicts of tensors of all ranks of `group`, in rank order. All ranks pass the same names with the same
    dtypes and trailing shapes; the first dimension may differ, and may be 0: tensors travel padded to the longest."""
    gathered = [{} for _ in range(dist.get_world_size(group))]
    for name in sorted(tensors):
        tensor = tensors[name]
        length = torch.tensor([len(tensor)], device=tensor.device)
        lengths = [torch.empty_like(length) for _ in gathered]
        dist.all_gather(lengths, length, group=group)
        padded = tensor.new_zeros(int(max(lengths)), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        pieces = [torch.empty_like(padded) for _ in gathered]
        dist.all_gather(pieces, padded, group=group)
        for part, piece, length in zip(gathered, pieces, lengths):
            part[name] = piece[:length]
    return gathered


# ---- gradients -----------------------------------------------------------------------------------
def gradient_norm(run, parameters):
    """Return the Euclidean norm of all gradients, over all shards of one replica. torch's clip_grad_norm_ refuses
    parameters of different meshes: those that tensor parallelism cuts have one more dimension."""
    squares = 0.0
    for p in parameters:
        if p.grad is None:
            continue
        gradient = local(p.grad).flatten()
        size = max(1, len(gradient)) if gradient.is_cuda else 2**20  # a CPU makes a float64 copy of what it is given
        parts = gradient.split(size)
        square = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]).square().sum()
        dimensions = p.device_mesh.mesh_dim_names if isinstance(p, DTensor) else ()
        if "tp" in dimensions and p.placements[-1].is_shard():  # each tp rank has another part
            square = square * run.args.tp_size  # all_sum will divide by it: it takes tp ranks to hold the same
        squares += square
    (total,) = all_sum(run, squares)
    return math.sqrt(total / run.args.replicate_size)


def clip_grad_norm(run, policy, limit):
    """Scale all gradients in place so that their global norm is at most `limit` (0: never scale), and return the norm
    before that. Gradients of partial_parameters must have been summed over the tp ranks by then."""
    norm = gradient_norm(run, policy.parameters())
    factor = min(1.0, limit / (norm + 1e-6))  # 1 for a norm that is NaN: the script skips such a step
    if limit > 0 and factor < 1:
        gradients = [local(p.grad) for p in policy.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, factor)  # few kernels for all of them
    return norm


def param_groups(policy, weight_decay):
    """Return AdamW's groups: matrices decay, norms and biases do not. The fused step wants one device mesh a group."""
    groups = {}
    for p in policy.parameters():
        decay = weight_decay if p.ndim > 1 else 0.0
        groups.setdefault((decay, getattr(p, "device_mesh", None)), []).append(p)
    return [{"params": parameters, "weight_decay": decay} for (decay, _), parameters in groups.items()]


# ---- tensor parallelism --------------------------------------------------------------------------
def partial_parameters(policy):
    """Return the parameters that tensor parallelism left whole in a cut layer, such as norms of heads. Each tp rank has
    the part of their gradient that comes from its own heads: the script sums these parts. In a step that was skipped
    there are no gradients."""
    return [p for module in policy.partial for p in module.parameters() if p.grad is not None]


def tensor_parallel(run, lm):
    """Cut every layer over the tp ranks by the model's own tp_plan, and embedding and head by vocabulary where its size
    allows, before any weight is read. Return the modules that stay whole inside a cut layer."""
    size = run.args.tp_size
    if size == 1:
        return []
    refusal = f"--tp_size {size} does not fit {type(lm).__name__}"
    vocabulary = {}
    for name, module in lm.named_modules():
        if module is lm.get_input_embeddings():
            vocabulary[name] = "embedding_rowwise"
        elif module is lm.get_output_embeddings():
            vocabulary[name] = "colwise_gather_output"
    plan = planned_styles(lm, vocabulary, refusal)
    if all(lm.get_submodule(name).weight.shape[0] % size == 0 for name in vocabulary):  # both, tied or not, or neither
        plan.update(vocabulary)
    for name in "num_attention_heads", "num_key_value_heads":
        heads = getattr(lm.config.get_text_config(), name, None) or size
        if heads % size:
            raise InputError(f"{refusal}: {name} is {heads}. Choose a divisor of it.")
    cuts = {}
    for name, style in plan.items():
        if STYLES[style] is None:
            continue
        shape = lm.get_submodule(name).weight.shape
        if shape[1 if style.startswith("rowwise") else 0] % size:
            raise InputError(f"{refusal}: {name} is {tuple(shape)}. Choose a divisor.")
        cuts[name] = STYLES[style]
    parallelize_module(lm, run.mesh["tp"], cuts)
    lm.tie_weights()  # the cut has made the head a parameter of its own
    return [lm.get_submodule(name) for name in plan if name not in cuts]


def planned_styles(lm, vocabulary, refusal):
    """Return {name of a module: style} as the model's tp_plan wants it, where a * stands for the number of a layer;
    without embedding and head, which are cut by vocabulary whatever the plan says."""
    styles = {}
    for name, part in [*lm.named_modules(), *lm.named_parameters()]:
        style = (lm.tp_plan or {}).get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))
        experts = isinstance(part, torch.nn.Parameter) and part.ndim > 2  # all experts of a layer in one tensor
        if name in vocabulary or (style is None and not experts):
            continue
        if style not in STYLES:
            raise InputError(f"{refusal}: its plan for {name} is {style}, which is no style here. Use --tp_size 1.")
        styles[name] = style
    if not styles:
        raise InputError(f"{refusal}: the model has no plan for its layers. Use --tp_size 1.")
    return styles
