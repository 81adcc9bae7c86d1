"""Saving and resuming: a checkpoint is there whole or not at all, and its checksums can tell."""

import hashlib
import json
import math
import os
import shutil
import time
import zlib
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from transformers import GenerationConfig

from common.batches import flat_batch, probe_groups
from common.runtime.flags import STOP, InputError, Preempted
from common.runtime.export import RELOADED, check_export, export, export_tokenizer, forget_code
from common.runtime.folders import META, STATE, checkpoints, copy_model, cut_logs, discard, keep_earlier
from common.runtime.folders import publish, remove, sum_written, write_tensors
from common.runtime.model import own_tensors
from common.runtime.parallel import all_sum
from common.runtime.run import LOGS, first_line, fsync, is_due, open_own, read_json, record, say, show_groups

CACHE_PART = 1024  # groups of each rank between two writes of log-probs that are kept
# Flags that may differ when a run goes on. For --dataset it is the rows that count, by their fingerprint.
FREE_FLAGS = """output_dir resume allow allow_changes dataset eval_dataset eval_rows eval_every save_every save_minutes
keep_last report_to tp_size replicate_size cpu_offload deterministic ddp_timeout""".split()
ROLLOUT_FLAGS = ("data", "seed", "batch_size", "steps_per_generation", "num_iterations")  # they choose a rollout's rows


# ---- save ----------------------------------------------------------------------------------------
def save_or_stop(run, step, steps, models, optimizers, tokenizer):
    """Write checkpoint-<step> every save_every steps, every save_minutes by rank 0's clock, at the last step, and when
    any rank was told to stop (SIGTERM, Ctrl-C): then the run leaves with exit code 4. All ranks decide alike."""
    run.step = step
    run.beat = time.monotonic()
    overdue = run.rank == 0 and run.beat - run.saved_at > 60 * run.args.save_minutes
    stop, overdue = all_sum(run, bool(STOP["signal"]), overdue)
    if stop or overdue or is_due(step, steps, run.args.save_every):
        folder = run.out / ".tmp-checkpoint"
        write_checkpoint(run, step, folder, models, optimizers, tokenizer)
        if run.rank == 0:
            publish(folder, run.out / f"checkpoint-{step:06d}")
            for old in checkpoints(run.out)[: -run.args.keep_last]:
                discard(old)
        run.saved_at = time.monotonic()
        run.saving += run.saved_at - run.beat
    if stop and step < steps:
        raise Preempted(f"stopped and saved after step {step}; to go on: {run.command} --resume auto")


def trainer_tensors(models, optimizers):
    """Return what training needs back, by name and sharded: the fp32 weights of every model and Adam's moments. An
    optimizer trains the model of its own name; a model may have none."""
    tensors = {}
    for name, model in models.items():
        for key, tensor in own_tensors(model).items():
            tensors[f"model.{name}.{key}"] = tensor
    for name, optimizer in optimizers.items():
        for parameter, p in models[name].named_parameters():
            state = optimizer.state[p]
            if not state:  # as AdamW would make it at its first step: loading needs a place to load into
                state["step"] = torch.zeros((), device=p.device)
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            for key, tensor in state.items():
                tensors[f"optim.{name}.{parameter}.{key}"] = tensor
    return tensors


def write_checkpoint(run, step, folder, models, optimizers, tokenizer, most_files=None):
    """Write a Hugging Face folder of the first model, and trainer/ with the rest. On return all is on the disk.
    most_files: without trainer/'s tensors, and of the weights no more files than these, for practice."""
    if run.rank == 0:
        folder.mkdir()  # an error where something has the name: what is written is written into a folder of our own
        (folder / "trainer").mkdir()
    dist.barrier(group=run.group)
    tensors = trainer_tensors(models, optimizers)
    ends = list(accumulate(tensor.numel() for tensor in tensors.values()))
    file_size = min(2**26, max(2**22, ends[-1] // 16))  # 16 to 256 MB: the writer builds files in memory, twice
    numbers = {name: 1 + end // file_size for name, end in zip(tensors, ends)}
    try:  # the writer keeps its one thread: with more it may swallow a full disk
        if most_files is None:
            writer = dcp.HuggingFaceStorageWriter(str(folder / "trainer"), numbers, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=run.group)
        export(run, next(iter(models.values())), folder, most_files)
        if run.rank == 0:
            export_tokenizer(tokenizer, folder)
            forget_code(folder)
        write_meta(run, step, folder)
    except (OSError, ValueError, SafetensorError, dcp.CheckpointException) as e:  # the last one is a BaseException
        text = "Check the disk and the model's generation_config.json; the checkpoint before is whole."
        raise InputError(f"could not save to {folder.parent}: {first_line(e)}. {text}") from e
    dist.barrier(group=run.group)


def write_meta(run, step, folder):
    """Write the state and meta.json, with checksums of all files and of itself, and bring every file to the disk."""
    meta = {"step": step, "flags": vars(run.args), "data": run.data, "versions": run.versions, "state": {}}
    tensors = {}
    for name, value in run.state.items():
        if isinstance(value, dict) and any(map(torch.is_tensor, value.values())):
            tensors.update({f"{name}/{key}": tensor for key, tensor in value.items()})
        else:
            meta["state"][name] = value
    if run.rank == 0:
        write_tensors(tensors, folder / STATE)
    meta["crc32"] = sum_written(run, folder)
    if run.rank != 0:
        return
    logs = [run.out / name for name in LOGS if (run.out / name).is_file()]
    meta["offsets"] = {log.name: log.stat().st_size for log in logs}
    meta["own_crc32"] = zlib.crc32(json.dumps(meta).encode())
    (folder / META).write_text(json.dumps(meta, indent=1))
    for path in [*logs, folder / META, folder / "trainer", folder]:
        fsync(path)


# ---- resume --------------------------------------------------------------------------------------
def check_resume(run):
    """A run goes on with the same flags and rows only, unless --allow_changes says otherwise."""
    if not run.checkpoint:
        return
    meta = read_json(run.checkpoint / META)
    current = json.loads(json.dumps({**vars(run.args), "data": run.data}))  # tuples become lists, as they did there
    saved = {**meta["flags"], "data": meta["data"]}
    changed = [name for name in saved if name not in FREE_FLAGS and saved[name] != current.get(name)]
    if changed and not run.args.allow_changes:
        changes = "; ".join(f"{name} was {saved[name]}, is {current.get(name)}" for name in changed)
        raise InputError(f"{run.checkpoint}: {changes}. --allow_changes resumes nevertheless.")
    changed_rows = [name for name in changed if name in ROLLOUT_FLAGS]
    with safe_open(run.checkpoint / STATE, "pt") as state:
        if changed_rows and any(name.startswith("rollout/") for name in state.keys()):
            raise InputError(f"{run.checkpoint} lies within a rollout, which {changed_rows} would give other prompts.")
    if "batch_size" in changed:
        done, was, now = meta["step"], saved["batch_size"], run.args.batch_size
        rows = f"{done} steps of --batch_size {was} read {done * was} rows, step {done + 1} goes on at row {done * now}"
        say(run, f"resume    {rows} (counted from 0, over all epochs, in the order of --seed)")
    if meta["versions"] != run.versions:
        say(run, f"resume    is not bitwise exact: saved with {meta['versions']}, now {run.versions}")


def resume(run, models, optimizers, tokenizer):
    """Load run.checkpoint, if there is one, and cut the run's logs back to it: no doubles, no gaps. A fresh run saves
    once for practice instead, so that a full disk or a model that does not survive saving shows in minute one. Of a
    large model it is one file: a whole checkpoint of 8B weights has 128 GB, while every GPU waits."""
    tensors = trainer_tensors(models, optimizers)
    if not run.checkpoint:
        need = 4 * sum(tensor.nbytes for tensor in tensors.values())  # an export is a third of a checkpoint, or less
        free = shutil.disk_usage(run.out).free
        if free < need:
            raise InputError(f"{run.out}: three checkpoints need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.")
        folder = run.out / ".tmp-rehearsal"
        most_files = 1 if run.weights > RELOADED else None
        write_checkpoint(run, 0, folder, models, optimizers, tokenizer, most_files)
        check_export(run, next(iter(models.values())), tokenizer, folder, most_files)
        if run.rank == 0:
            remove(folder)
        return
    meta = read_json(run.checkpoint / META)
    files = [str(run.checkpoint / name) for name in meta["crc32"] if name.startswith("trainer/")]
    try:
        reader = dcp.HuggingFaceStorageReader(str(run.checkpoint / "trainer"))
        reader.fs.ls = lambda _: files  # else it opens whatever is there
        saved = {name for name in reader.read_metadata().state_dict_metadata if "/" not in name}  # not the state's
        if saved != tensors.keys():
            raise dcp.CheckpointException(f"{len(saved ^ tensors.keys())} tensors are in one of the two only", {})
        dcp.load(tensors, storage_reader=reader, process_group=run.group)  # in place
    except dcp.CheckpointException as e:
        raise InputError(f"{run.checkpoint} does not fit --model {run.args.model}: {first_line(e)}") from e
    run.step = meta["step"]
    run.state = {"alerts": {}, **meta["state"]}
    for path, tensor in load_file(run.checkpoint / STATE).items():
        name, key = path.split("/")
        run.state.setdefault(name, {})[key] = tensor
    if run.rank == 0:
        cut_logs(run.out, meta["offsets"])
        keep_earlier(run.out, run.checkpoint, run.step, run.args.keep_last)
    say(run, f"resumed   {run.checkpoint}")


# ---- finish --------------------------------------------------------------------------------------
def finish(run, policy, tokenizer, heldout):
    """Make final/ of the last checkpoint. Reloaded from there, the model completes two prompts for the eye."""
    final = run.out / "final"
    if run.rank == 0:
        copied = run.out / ".tmp-final"
        copy_model(checkpoints(run.out)[-1], copied)
        (copied / "README.md").write_text(f"Made by `{run.command}`.\n")
        for path in [*copied.rglob("*"), copied]:
            fsync(path)
        publish(copied, final)
    dist.barrier(group=run.group)
    reloaded = check_export(run, policy, tokenizer, final)
    if heldout and run.weights > RELOADED:
        say(run, f"sample    left out: a model of more than {RELOADED / 1e6:.0f}M weights is not loaded a second time")
    for group in heldout[: 2 if reloaded else 0]:
        prompt = list(group["prompt"] or group["completions"][0]["ids"][:16])  # of a row without prompt, its beginning
        positions = getattr(reloaded.config.get_text_config(), "max_position_embeddings", None) or math.inf
        length = max(1, min(64, positions - len(prompt)))
        rules = GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=0)
        rules.eos_token_id = policy.lm.generation_config.eos_token_id
        reloaded.generation_config = rules  # a stranger's would fill in what ours leaves open
        ids = reloaded.generate(torch.tensor([prompt]), generation_config=rules)[0]
        completion = {"ids": ids[len(prompt) :].tolist(), "scored": None}
        show_groups(run, "sample", [{"prompt": prompt, "completions": [completion]}], tokenizer)
    for key, value in run.state.get("last", {}).items():
        say(run, f"{key:<24} {run.state['before'][key]:.4f} -> {value:.4f}")
    say(run, "")
    say(run, f'  lm = {policy.auto_class.__name__}.from_pretrained("{final}")')
    say(run, f'  tokenizer = AutoTokenizer.from_pretrained("{final}")')
    if run.rank == 0:
        summary = {key: run.state.get(key) for key in ("before", "last", "best", "alerts")}
        summary |= {"seconds": time.monotonic() - run.started, "save_seconds": run.saving}
        record(run.out, status="finished", exit_code=0, **summary)
    if run.tracker:
        run.tracker.finish()


# ---- cache ---------------------------------------------------------------------------------------
def uncached(run, policy, groups, name, values, *settings):
    """Fill values (groups, 2), float64, from ref_logprobs_<name>.safetensors. What the file lacks is yielded in parts
    of numbered groups: the caller adds this rank's rows of a part to values, and here they are summed over the ranks
    and written, so that a run that ends in the middle goes on from there. All ranks take part."""
    path = run.out / f"ref_logprobs_{name}.safetensors"
    key = cache_key(run, policy, groups, *settings)
    known = load_file(path).get(key, []) if path.is_file() else []
    done = len(known)
    if done:
        values[:done] = known
    while done < len(groups):
        part = groups[done : done + CACHE_PART * run.dp_size]
        yield [group | {"number": done + i} for i, group in enumerate(part)]
        rows = values[done : done + len(part)]
        dist.all_reduce(rows, group=run.group)
        rows.copy_((rows / run.args.tp_size).float())  # tp ranks compute the same rows; the file holds fp32
        done += len(part)
        if run.rank == 0:
            written = run.out / ".tmp-logprobs"
            with open_own(written, "xb") as file:
                file.write(save({key: values[:done].float().cpu()}))
            fsync(written)  # or a power cut could leave an empty file, which no resume could read
            os.replace(written, path)


def cache_key(run, policy, groups, *settings):
    """Return a digest of what log-probs of these groups depend on: prompts, completions and what of them is scored, the
    settings, the device, and of the policy its name, its temperature and its log-probs of a few tokens."""
    probe = flat_batch(probe_groups(policy.lm.get_input_embeddings().num_embeddings), run.device)
    logprobs = [round(value, 3) for value in policy(probe)["logprobs"].tolist()]
    known = (run.args.model, run.device.type, policy.temperature, settings, logprobs)
    digest = hashlib.blake2b(repr(known).encode(), digest_size=16)
    for group in groups:
        completions = [(completion["ids"], completion["scored"]) for completion in group["completions"]]
        digest.update(repr((group["prompt"], completions)).encode())
    return digest.hexdigest()
