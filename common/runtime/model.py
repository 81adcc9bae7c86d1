"""From a model folder to a model that is ready to train: its structure, its weights, a check, and its memory."""

import math
import os
import re
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import DryRunError
from safetensors import safe_open
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from common.attention import refuse_rotary
from common.batches import flat_batch, group_tokens, probe_groups
from common.runtime.flags import COMMON, InputError
from common.runtime.health import check, spread_gap
from common.runtime.parallel import agree, all_most, local
from common.runtime.run import first_line, read_json
from common.tokenization import load_tokenizer

WEIGHTS = "model.safetensors"
POSITION_TABLES = r"(wpe|embed_positions|positions_embed|position_embeddings)$"  # learned: names of their modules


# ---- structure -----------------------------------------------------------------------------------
def load_model(model_class, args, flag="model", **head):
    """Return the tokenizer and the model that a flag names, on the meta device: no weight has memory yet. `head` is
    what the head of an auto class needs in the config (num_labels=1). Dropout is 0 and the module stays in eval mode:
    shared prompts, recomputation and ratios to old log-probs need a forward that repeats itself."""
    name = vars(args)[flag]
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # its tables quote the folder; what matters is said below
    try:
        folder = model_folder(name, flag)
        stored = stored_tensors(folder)
        check_config(folder, stored)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **head)
        if model_class is AutoModelForCausalLM and "Classification" in str(config.architectures):
            raise ValueError(f"{config.architectures} is a classifier, and no language model")
        with torch.device("meta"):
            lm = model_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
            check_sizes(lm, stored)
            if unties(lm, stored):
                config.tie_word_embeddings = False  # saved with the model: it is true of what we train
                lm = model_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
        lm.name_or_path = folder
        lm.generation_config = GenerationConfig.from_model_config(config)
        if (Path(folder) / "generation_config.json").is_file():
            lm.generation_config = GenerationConfig.from_pretrained(folder)
        transformers.DynamicCache(config=lm.config)  # sampling needs it, be it at the end of the run
    except Exception as e:  # the loader may raise anything, and what it reads is input
        raise InputError(f"--{flag} {name}: {first_line(e)}. Pass a Hugging Face model folder or hub id.") from e
    tokenizer = load_tokenizer(folder, args.chat_template)
    ids = max(tokenizer.get_vocab().values(), default=0) + 1
    embeddings = lm.get_input_embeddings().num_embeddings
    if ids > embeddings:
        raise InputError(f"--{flag} {name}: {embeddings} embeddings, but {ids} token ids. Pass another.")
    refuse_rotary(lm.config, args.max_length)
    for module in lm.modules():
        for name, value in vars(module).items():  # the rate of a Dropout module, or a number like attention_dropout
            if isinstance(value, float) and (name.endswith("dropout") or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    return tokenizer, lm.eval()


def model_folder(name, flag="model"):
    """Return the folder of a flag's model. Of a hub id, or ID@REVISION, it holds the weights that are read, and no
    others; its own name is the commit."""
    if name in ("tiny", "tiny:other_teacher"):
        return str(COMMON / "tiny" / (name.partition(":")[2] or flag))
    if Path(name).is_dir():
        return name
    hub_id, _, revision = name.partition("@")
    folder = download(hub_id, revision or None, ["*.json", "*.jinja", "*.model", "*.txt", WEIGHTS])
    files = [Path(file).name for file in weight_files(folder)]
    return download(hub_id, Path(folder).name, files)


def download(hub_id, revision, patterns):
    """Return the folder of a snapshot with the files of these names. The first rank of a machine refuses what does not
    fit on its disk; the hub cannot say how much that is where the cache is all there is (HF_HUB_OFFLINE)."""
    what = {"revision": revision, "allow_patterns": patterns}
    missing = []
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(DryRunError):
            missing = snapshot_download(hub_id, dry_run=True, **what)
    need = sum(file.file_size for file in missing if file.will_download)
    if need:
        cache = Path(HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if free < need:
            raise ValueError(f"{need / 1e9:.1f} GB to download, and {free / 1e9:.1f} GB are free in {cache}")
    return snapshot_download(hub_id, **what)


# ---- weights -------------------------------------------------------------------------------------
def weight_files(folder):
    """Return the paths of the files with the weights: those that transformers would read, whatever else is there."""
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError("adapter_config.json is an adapter's: merge it into its model, or remove it")
    name = read_json(folder / "config.json").get("transformers_weights") or WEIGHTS
    if name == WEIGHTS and not (folder / WEIGHTS).is_file():
        name = f"{WEIGHTS}.index.json"
    names = [name]
    if name.endswith(".index.json"):
        names = sorted(set(read_json(folder / name).get("weight_map", {}).values()))
    for file in names:
        if Path(file).name != file:
            raise ValueError(f"its index names {file}, which is not in the folder")
    if not names:
        raise ValueError(f"there is no {WEIGHTS}, and no {WEIGHTS}.index.json that names files")
    return [str(folder / file) for file in names]


def stored_tensors(folder):
    """Return {name: (file, shape)} of the tensors in the files with the weights, of which only the headers are read."""
    stored = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                stored[name] = file, tensors.get_slice(name).get_shape()
    return stored


def check_config(folder, stored):
    """Refuse a config with more layers than there are tensors, or more experts or labels than tensors or rows of one,
    before anything is built of it: a billion layers would be built until the memory ends."""
    sizes = [len(stored)]
    for _, shape in stored.values():
        sizes += shape
    parts = [read_json(Path(folder) / "config.json")]
    while parts:
        for name, value in parts.pop().items():
            most = math.inf
            if isinstance(value, dict):  # text_config
                parts.append(value)
            elif re.search("layers?$", name) and not name.startswith("max_"):  # max_window_layers is no count
                most = len(stored)
            elif re.search("experts$|^num_labels$", name):
                most = max(sizes)
            if isinstance(value, int) and value > most:
                raise ValueError(f"config.json says {name} {value}, and its files hold {len(stored)} tensors")


def check_sizes(lm, stored):
    """Refuse a model, still without memory, of more than twice the weights that its files hold. A new head is small."""
    built = sum(p.numel() for p in lm.parameters())
    held = sum(math.prod(shape) for _, shape in stored.values())
    if built > 2 * held:
        raise ValueError(f"config.json describes {built} weights, and its files hold {held}")


def unties(lm, stored):
    """Return whether a model whose config ties its head to the embedding comes with two that differ. As transformers
    does, they are then two weights; the config is wrong."""
    for pair in lm.all_tied_weights_keys.items():
        if stored.keys() >= set(pair):
            first, second = (safe_open(stored[name][0], "pt").get_tensor(name) for name in pair)
            if not torch.equal(first, second):
                return True
    return False


def materialize(lm, device, rope_device):
    """Give memory to a model on the meta device. Of its values only the buffers, the rotary tables, are set by then;
    they live on rope_device even where the weights are offloaded."""
    lm.to_empty(device=device)
    for p in lm.parameters():
        p._is_hf_initialized = True
    lm.initialize_weights()
    lm.tie_weights()
    for buffer in lm.buffers():
        buffer.data = buffer.to(rope_device)
    return lm


def own_tensors(module):
    """Return {name: tensor} of the weights and persistent buffers, sharded as they are. A tied weight appears once."""
    known = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor for name, tensor in module.state_dict().items() if name in known}


@torch.no_grad()
def load_weights(run, policy, flag="model"):
    """Fill the policy with the weights of its folder, which `flag` names, and return it. Every rank reads its own
    slices of the files. If they have other names (experts that transformers fuses) or lack a new head, rank 0 reads the
    whole model, which makes the head, and broadcasts it tensor by tensor."""
    device = "cpu" if run.args.cpu_offload else run.device
    lm = materialize(policy.lm, device, rope_device=run.device)
    run.weights = run.weights or sum(p.numel() for p in policy.parameters())
    tensors = own_tensors(lm)
    error = None
    try:
        reader = dcp.HuggingFaceStorageReader(lm.name_or_path)
        files = weight_files(lm.name_or_path)
        reader.fs.ls = lambda _: files  # else it reads every file of the folder, and of equal names the last one wins
        if tensors.keys() <= reader.read_metadata().state_dict_metadata.keys():
            dcp.load(tensors, storage_reader=reader, process_group=run.group)
            return policy
        if run.rank == 0:
            weights = read_whole_model(run, policy)
    except (Exception, dcp.CheckpointException) as e:  # readers may raise anything; the last is a BaseException
        error = f"--{flag} {vars(run.args)[flag]}: {first_line(e)}. Pass a Hugging Face model folder or hub id."
    agree(run, error)
    for name, tensor in tensors.items():
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=run.device)
        if run.rank == 0:
            values.copy_(weights[name])
        dist.broadcast(values, group=run.group, group_src=0)
        if isinstance(tensor, DTensor):  # each rank cuts its part out of what it received
            values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
        local(tensor).copy_(local(values))
    return policy


def read_whole_model(run, policy):
    """Return {name: tensor} as transformers reads the folder. A head that it lacks is drawn with --seed."""
    folder = policy.lm.name_or_path
    torch.manual_seed(run.args.seed)
    options = {"dtype": torch.float32, "output_loading_info": True, **policy.head_config}
    model, info = policy.auto_class.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **options)
    missing = sorted(set(info["missing_keys"]) - policy.new)
    if missing:
        raise ValueError(f"its weights lack {len(missing)} tensors, {missing[0]} for one")
    if model.all_tied_weights_keys.keys() != policy.lm.all_tied_weights_keys.keys():
        raise ValueError("its head differs from the embedding: write tie_word_embeddings false into its config.json")
    return model.state_dict()


@torch.no_grad()
def check_model(run, policy, tokenizer, groups):
    """MODEL001: compare what training will compute with the model's own attention and head, one sequence at a time.
    MODEL002: rows of `groups`, training's and held-out ones, are longer than what the model was made for."""
    check_lengths(run, policy.lm, groups)
    register_fsdp_forward_method(policy, "plain_forward")  # FSDP2 gathers the weights for its forward methods only
    probes = probe_groups(len(tokenizer))
    outputs = policy(flat_batch(probes, run.device))[policy.output]
    gap = spread_gap(outputs, policy.plain_forward(probes))
    text = f"{policy.output} on the {policy.road} road differ from the model's own forward: this model is not supported"
    metric = f"{policy.output} difference / spread"
    check(run, "MODEL001", 0, metric, gap, text, error=1e-4, rounding=0.05)


def check_lengths(run, lm, groups):
    rows = [len(group["prompt"]) + max((len(c["ids"]) for c in group["completions"]), default=0) for group in groups]
    longest_row = max(rows) + getattr(run.args, "max_completion_length", 0)
    for name, module in lm.named_modules():
        if isinstance(module, torch.nn.Embedding) and re.search(POSITION_TABLES, name):
            size = module.num_embeddings - getattr(module, "offset", 0)
            if longest_row > size:
                text = f"a row has {longest_row} tokens, the model's table {size} positions: type --max_length {size}"
                raise InputError(f"--model {run.args.model}: {text}, or pass another model.")
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or math.inf
    fix = ("--max_length", run.args.max_length, limit)
    text = "a row is longer than the model's max_position_embeddings"
    check(run, "MODEL002", 0, "tokens", longest_row, text, warn=limit, fix=fix)


# ---- memory --------------------------------------------------------------------------------------
def longest(groups, completion=0):
    """Return the tokens of the largest group. Its completions count as `completion` tokens together at least."""
    return max(max(group_tokens(group), len(group["prompt"]) + completion) for group in groups)


def fit_memory(run, policy, tokenizer, tokens):
    """Apply --compile and --activation_checkpointing, under which layers are computed again in backward. auto does that
    where what autograd would keep of the largest micro-batch does not fit beside gradients and Adam's moments; where
    there is room for whole weights and gradients, too, the policy keeps them from a step's first micro-batch to its
    last. `tokens` are those of the largest group. All ranks decide alike: layers may be collective. Return a sentence
    for the plan."""
    args = run.args
    recompute = args.activation_checkpointing == "on"
    sentence = "not looked at"
    if args.activation_checkpointing == "auto":
        most = max(tokens, min(args.tokens_per_microbatch, args.batch_size * tokens))
        activations = activation_bytes(run, policy, tokenizer) * most
        gradients_and_moments = 12 * sum(local(p).numel() for p in policy.parameters())
        room = 0.8 * free_bytes() - gradients_and_moments  # the rest: logits, a layer's gradients
        recompute = all_most(run, activations > room) == 1
        sentence = f"up to {activations / 1e9:.2f} GB of activations, of {most} tokens"
        whole = (run.dtype.itemsize + 4) * run.weights / args.tp_size  # gradients are fp32
        room -= whole + (0 if recompute else activations)
        policy.stays_whole = run.world > args.tp_size and not args.cpu_offload and all_most(run, room < 0) == 0
        if policy.stays_whole:
            sentence += f"; {whole / 1e9:.2f} GB keep weights and gradients whole until a step's last micro-batch"
    for layer in policy.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            if args.compile:
                layer.forward = torch.compile(layer.forward, dynamic=True)  # each micro-batch has a size of its own
            if recompute:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return sentence + (": layers are computed again in backward" if recompute else "")


def activation_bytes(run, policy, tokenizer):
    """Return the bytes that autograd keeps for backward, for each token of a small batch. Weights do not count."""
    batch = flat_batch(probe_groups(len(tokenizer)), run.device)
    storages = {}  # by address, for views share a storage

    def keep(tensor):
        part = getattr(tensor, "_local_tensor", tensor)
        storage = getattr(part, "elem", part).untyped_storage()  # elem: of a collective on its way
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = policy(batch)[policy.output].sum()
    for p in policy.parameters():
        storages.pop(local(p).untyped_storage().data_ptr(), None)
    kept = sum(storage.nbytes() for storage in storages.values())
    loss.backward()  # FSDP2 counts on a backward after each forward
    policy.zero_grad(set_to_none=True)
    return kept / len(batch["input_ids"])


def check_fits(text, need):
    """Raise InputError if `need` bytes are more than this rank may allocate. text: what takes them."""
    free = free_bytes()
    if need > free:
        gigabytes = f"{need / 1e9:.1f} GB on every rank, and {free / 1e9:.1f} GB are free"
        raise InputError(f"{text} {gigabytes}. Choose a smaller model.")


def free_bytes():
    """Return the bytes that this rank may still allocate: of its GPU, or its part of the machine's memory."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        for segment in torch.cuda.memory_snapshot():  # and what the allocator holds unused; only graphs use their pools
            if segment["segment_pool_id"] == (0, 0):
                free += segment["total_size"] - segment["allocated_size"]
        return free
    info = Path("/proc/meminfo")
    if not info.is_file():
        return float("inf")
    kilobytes = int(re.search(r"MemAvailable: *(\d+)", info.read_text())[1])
    return kilobytes * 1024 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
