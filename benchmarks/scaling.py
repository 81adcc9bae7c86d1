"""
How the cost of a token grows on the CPU, and how long a script takes to start. Rows go to results/scaling.jsonl.

    python benchmarks/scaling.py [--only PART ...] [--threads 2] [--rounds 2] [--repeats 3] [--tiny] [--out FILE.jsonl]

length      rows of 128 to 2048 tokens, the same number of tokens in all
group       1 to 16 completions of one prompt, the same number of completions in all
vocabulary  the head alone, 1k to 150k words, then 1x to 8x the tokens; plain: logits and cross_entropy
size        models of 1.4M to 63M weights, with the optimizer's step
ranks       methods/sft.py itself, micro-batches of 256 and 2048 tokens, two steps after the first: in one process with
            one thread and with two (FSDP2 has no part in it), in two with one thread each (gloo), as FSDP2 shards,
            replicas and tensor parallelism cut it. each: FSDP2 that gathers and reduces in every micro-batch
profile     where a step of ranks goes, FSDP2 on two ranks beside one process with one thread: rank 0's seconds by what
            an operator is for, as torch.profiler has them
spread      rows of log-normal length, sigma 0 to 1.5, the same number of tokens in all
startup     --help, a wrong flag, and the first optimizer step of the tiny lab, of every script

Random weights and ids, fp32. Every point is a process of its own, forked from one that has imported torch and computed
nothing; a round visits all points of a part, and each point repeats its work. One repetition is what a step does with
its rows: micro-batches, flat batches, forward, backward (size, ranks: and AdamW). In the same process, just before and
just after, the rate of an fp32 matrix product: the work's FLOPs at that rate are the least time it could take. FLOPs: 6
for every weight and token, 12 for every head dimension and pair of tokens that see each other; what is computed again
in backward does not count. Memory: how far the resident set rises above where it was just before (Linux).

A part's rows replace that part's old ones when all its points ended well. Exit code 2, one line each, where not.
"""
import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, SCRIPTS, script
from loading import memory
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.batches import flat_batch, pack
from common.logprobs import Policy, ScoredHead
from common.runtime.launch import setup

RESULTS = ROOT / "benchmarks" / "results" / "scaling.jsonl"
conftest.TIMEOUT = 600  # seconds for the ranks of one run
LIMITS = {"--help": 1.0, "flag error": 1.0, "first step": 20.0}  # seconds, on two cores
SETTINGS = [  # of processes
    {"ranks": 1, "threads": 1, "setting": "1 thread"},
    {"ranks": 1, "threads": 2, "setting": "2 threads"},
    {"ranks": 2, "setting": "FSDP2"},
    {"ranks": 2, "setting": "FSDP2, each"},
    {"ranks": 2, "setting": "2 replicas", "replicate_size": 2},
    {"ranks": 2, "setting": "tp 2", "tp_size": 2},
]
PROFILED = "1 thread", "FSDP2", "FSDP2, each"
PURPOSES = {  # of operators, by the beginning of their names; the first that fits
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "aten::_scaled_dot"),
    "waiting for the other rank": ("gloo:", "c10d::", "work:", "FSDP::"),
    "copies": ("aten::copy_", "aten::cat", "aten::_to_copy", "aten::_foreach_copy_", "aten::clone", "aten::_chunk_cat",
               "aten::split_with_sizes_copy", "aten::fill_", "aten::zero_", "fsdp::"),
    "optimizer": ("Optimizer.", "aten::_fused_adamw_", "aten::_foreach"),
}  # fmt: skip
MODEL = {"hidden": 256, "layers": 4, "vocabulary": 8192}
PADDED = 8  # rows of a padded batch, for comparison


def points(tiny):
    """-> {part: its points}; tiny: the same shapes an eighth of the size, to try the benchmark itself."""
    k = 8 if tiny else 1
    small = {"hidden": 64, "layers": 2, "vocabulary": 512} if tiny else MODEL
    head = {"hidden": 256 // k, "vocabulary": 50000 // k, "tokens": 512 // k}
    heads = [head | {"vocabulary": v // k} for v in (1000, 4000, 16000, 50000, 150000)]
    heads += [head | {"tokens": n // k} for n in (256, 1024, 2048)]
    sizes = ((32, 1), (64, 2)) if tiny else ((128, 2), (256, 4), (512, 6), (768, 8))
    shapes = [{"hidden": 64 if tiny else 512, "layers": 2 if tiny else 6, "budget": budget // k,
               "rows": max(4, budget // 16 // k)} for budget in (256, 2048)]
    return {
        "length": [small | {"length": n // k, "tokens": 4096 // k, "budget": 2048 // k}
                   for n in (128, 256, 512, 1024, 2048)],
        "group": [small | {"group": g, "prompt": 256 // k, "completion": 64 // k, "completions": 32,
                           "budget": 2560 // k} for g in (1, 2, 4, 8, 16)],
        "vocabulary": [point | {"side": side} for point in heads for side in ("ours", "plain")],
        "size": [{"hidden": hidden, "layers": layers, "vocabulary": small["vocabulary"], "length": 128, "tokens": 1024,
                  "budget": 1024} for hidden, layers in sizes],
        "ranks": [small | shape | {"steps": 3} | setting for shape in shapes for setting in SETTINGS],
        "profile": [small | shape | {"steps": 2, "profiled": True} | setting for shape in shapes
                    for setting in SETTINGS if setting["setting"] in PROFILED],
        "spread": [small | {"sigma": sigma, "mean": 128 // k, "longest": 1024 // k, "tokens": 8192 // k,
                            "budget": 2048 // k} for sigma in (0.0, 0.5, 1.0, 1.5)],
        "startup": [{"script": name, "what": what} for name in SCRIPTS for what in LIMITS],
    }  # fmt: skip


class Problem(Exception):
    """One line for the reader: a point could not be measured."""


# ---- rows and models -------------------------------------------------------------------------------------------------


def make_group(draw, prompt, *completions):
    """A group of random ids, for models of at least 512 words."""
    ids = [array("i", [draw.randrange(512) for _ in range(n)]) for n in (prompt, *completions)]
    return {"prompt": ids[0], "completions": [{"ids": x, "scored": None} for x in ids[1:]], "row": 0}


def lengths(point):
    """-> lengths of rows, point["tokens"] in all: alike, or log-normal with the mean of a point, cut at its longest."""
    draw, found, sigma = random.Random(0), [], point.get("sigma", 0)
    while (rest := point["tokens"] - sum(found)) > 0:
        typical = point.get("length") or point["mean"] * draw.lognormvariate(-(sigma**2) / 2, sigma)
        found.append(min(rest, point.get("longest", rest), max(4, round(typical))))
    return found


def make_groups(point):
    """-> the rows of a point. Every row is a first token that nothing predicts and a scored rest, or a group."""
    draw = random.Random(1)
    if "group" in point:
        sizes = [point["completion"]] * point["group"]
        return [make_group(draw, point["prompt"], *sizes) for _ in range(point["completions"] // point["group"])]
    return [make_group(draw, 1, n - 1) for n in lengths(point)]


def make_model(point):
    torch.manual_seed(0)
    heads = max(2, point["hidden"] // 64)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=point["vocabulary"], hidden_size=point["hidden"], intermediate_size=3 * point["hidden"],
        num_hidden_layers=point["layers"], num_attention_heads=heads, num_key_value_heads=heads // 2,
        head_dim=point["hidden"] // heads, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=2,
    )).eval()  # fmt: skip


def flops(lm, groups):
    """Forward and backward, every prompt once: the docstring's rule, counted from the groups."""
    config, tokens, pairs, scored = lm.config, 0, 0, 0
    for group in groups:
        prompt, answers = len(group["prompt"]), [len(c["ids"]) for c in group["completions"]]
        tokens += prompt + sum(answers)
        scored += sum(answers)
        pairs += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in answers)
    layers = sum(p.numel() for p in lm.model.layers.parameters() if p.ndim > 1)
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 6 * tokens * layers + 12 * pairs * width + 6 * scored * config.vocab_size * config.hidden_size


# ---- work ------------------------------------------------------------------------------------------------------------


def trunk(point):
    """The whole model on a step's rows -> the work, a small first run of it, and what is known of it."""
    policy, groups = Policy(make_model(point)), make_groups(point)
    adam = torch.optim.AdamW(policy.parameters(), lr=1e-5, fused=True) if point["part"] == "size" else None

    def work(rows=groups):
        scored = sum(len(c["ids"]) for group in rows for c in group["completions"])
        for members in pack(rows, point["budget"]):
            (-policy(flat_batch(members))["logprobs"].sum() / scored).backward()
        if adam:
            adam.step()

    batches = [flat_batch(members) for members in pack(groups, point["budget"])]
    known = {"weights": sum(p.numel() for p in policy.parameters()), "flops": flops(policy.lm, groups)}
    known |= {"computed_tokens": sum(len(b["input_ids"]) for b in batches), "micro_batches": len(batches)}
    if "group" in point:
        known |= {"useful_tokens": point["completion"] * point["completions"]}
    else:
        rows = lengths(point)
        padded = [rows[i : i + PADDED] for i in range(0, len(rows), PADDED)]
        known |= {"useful_tokens": sum(rows), "padded_tokens": sum(len(some) * max(some) for some in padded)}
    return work, lambda: work([make_group(random.Random(2), 8, 8, 8), make_group(random.Random(3), 1, 8)]), known


def head(point):
    """The head alone, forward and backward, weights and hidden states with gradients."""
    torch.manual_seed(0)
    vocabulary, hidden, tokens = point["vocabulary"], point["hidden"], point["tokens"]
    weight = (torch.randn(vocabulary, hidden) * hidden**-0.5).requires_grad_()
    weight.grad = torch.zeros_like(weight)
    states, labels = torch.randn(tokens, hidden), torch.randint(vocabulary, (tokens,))

    def work(count=tokens):
        h = states[:count].clone().requires_grad_()
        if point["side"] == "ours":
            ScoredHead.apply(h, weight, None, labels[:count], (1.0, 0.0, 1.0), (), None)[0].sum().backward()
        else:
            F.cross_entropy(h @ weight.T, labels[:count], reduction="sum").backward()

    known = {"flops": 6 * tokens * vocabulary * hidden, "useful_tokens": tokens, "weights": weight.numel()}
    return work, lambda: work(4), known


def matmul_rate():
    """FLOP/s of an fp32 product of two square matrices: the best of five."""
    a, b, times = torch.randn(1024, 1024), torch.randn(1024, 1024), []
    for _ in range(5):
        begun = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begun)
    return 2 * 1024**3 / min(times)


def measure(point, threads, repeats):
    torch.set_num_threads(threads)
    base = memory("VmRSS")
    work, warm, known = (head if point["part"] == "vocabulary" else trunk)(point)
    rates = [matmul_rate()]
    warm()  # gradients, the optimizer's moments, pages of code
    warm()
    gc.collect()
    before, seconds, busy = memory("VmRSS"), [], []
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    for _ in range(repeats):
        begun, cpu = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - begun)
        busy.append(time.process_time() - cpu)
    peak = memory("VmHWM")
    rates.append(matmul_rate())
    known |= {"seconds": seconds, "cpu_seconds": busy, "matmul_flops_per_second": rates}
    return known | {"model_bytes": before - base, "rise_bytes": peak - before}


def forked(point, threads, repeats):
    """measure in a process of its own."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: there.send(measure(point, threads, repeats)))
    child.start()
    there.close()  # else recv would wait for a child that died
    try:
        found = here.recv()
    except EOFError:
        found = None
    child.join()
    if found is None:
        raise Problem(f"its process ended with exit code {child.exitcode}" + " (out of memory?)" * (child.exitcode < 0))
    return found


# ---- ranks -----------------------------------------------------------------------------------------------------------


def local_bytes(tensors):
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in tensors)


def seconds_by_purpose(profiler):
    """-> {purpose: seconds} of what torch.profiler saw: of each operator the time that no operator inside it took."""
    found = dict.fromkeys([*PURPOSES, "other operators"], 0.0)
    for event in profiler.key_averages():
        purpose = next((name for name, begins in PURPOSES.items() if event.key.startswith(begins)), "other operators")
        found[purpose] += event.self_cpu_time_total / 1e6
    return found


def train(rank, world, argv, point):
    """methods/sft.py's own main on this rank, watched at the end of each update but the first."""
    torch.set_num_threads(point.get("threads", 1))
    module, found, at = script("sft"), {}, []
    shard, resume, check_update, log = module.shard, module.resume, module.check_update, module.log
    kept, profiler = {}, torch.profiler.profile() if point.get("profiled") else None

    def watched(policy, run):
        found["base"] = memory("VmRSS")  # the model has no memory yet
        return shard(policy, run)

    def resumed(run, models, optimizers, tokenizer):
        if point["setting"] == "FSDP2, each":
            models["policy"].stays_whole = False
        kept.update(policy=models["policy"], optimizer=optimizers["policy"])
        resume(run, models, optimizers, tokenizer)

    def checked(run, step, policy, groups, metrics):  # after the optimizer's step, before zero_grad
        found["gradients"] = local_bytes(p.grad for p in policy.parameters())
        check_update(run, step, policy, groups, metrics)

    def logged(run, step, metrics, steps):  # after zero_grad
        if not at:  # all that lives through the run is there now
            Path("/proc/self/clear_refs").write_text("5")
            moments = [t for state in kept["optimizer"].state.values() for t in state.values()]
            found["parameters"] = local_bytes(kept["policy"].parameters())
            found["optimizer"] = local_bytes(moments)
        found.update(num_tokens=metrics["num_tokens"], rise_bytes=memory("VmHWM") - found["base"])
        if profiler and not at:
            profiler.start()
        at.append((time.perf_counter(), time.process_time()))
        if profiler and len(at) == 2:
            profiler.stop()
            found["purposes"] = seconds_by_purpose(profiler)
        log(run, step, metrics, steps)

    module.shard, module.resume, module.check_update, module.log = watched, resumed, checked, logged
    args = module.parse_args(argv)
    module.main(args, setup(args, module.__file__))
    steps = [[b - a for a, b in zip(*pair)] for pair in zip(at, at[1:])]
    return found | {"seconds": [s for s, _ in steps], "cpu_seconds": [c for _, c in steps]}


def save_model(_rank, _world, point, folder):
    lm = make_model(point)
    lm.save_pretrained(folder)
    for file in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja":
        shutil.copy(ROOT / "common/tiny/model" / file, folder / file)
    return sum(p.numel() for p in lm.parameters())


def ranks(point):
    """-> seconds of rank 0, CPU seconds of all ranks together, bytes of the rank that has most."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"model": f"{folder}/model", "output_dir": f"{folder}/out", "dataset": "tiny", "max_length": 256,
                 "batch_size": point["rows"], "max_steps": point["steps"], "eval_every": 0, "save_every": 0,
                 "tokens_per_microbatch": point["budget"], "tp_size": point.get("tp_size", 1),
                 "replicate_size": point.get("replicate_size", 1)}  # fmt: skip
        argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        try:
            (weights,) = conftest.ranks(1, save_model, point, Path(folder, "model"))
            found = conftest.ranks(point["ranks"], train, argv, point)
        except AssertionError as e:  # what a rank said
            raise Problem(str(e).strip().splitlines()[-1]) from e
    known = {key: max(rank[key] for rank in found) for key in ("parameters", "gradients", "optimizer", "rise_bytes")}
    if "purposes" in found[0]:
        known["purposes"] = found[0]["purposes"]
    known |= {"seconds": found[0]["seconds"], "useful_tokens": found[0]["num_tokens"]}
    known |= {"cpu_seconds": [sum(step) for step in zip(*(rank["cpu_seconds"] for rank in found))]}
    return known | {"weights": weights}


# ---- start-up --------------------------------------------------------------------------------------------------------


def startup(name, what, threads):
    """-> seconds and CPU seconds of a fresh process to its end, or to the line of its first optimizer step."""
    commands = {"--help": (["--help"], 0), "flag error": (["--learning_rate", "-1"], 2), "first step": ([], -9)}
    flags, wanted = commands[what]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command, last = [sys.executable, ROOT / "methods" / f"{name}.py", *flags], ""
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)  # fmt: skip
        for line in process.stdout:
            last = line.strip() or last
            if re.match(r"step 1\b", line):
                process.kill()
                break
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.perf_counter() - begun, os.waitstatus_to_exitcode(status)
    if process.returncode != wanted:
        raise Problem(f"methods/{name}.py ended with exit code {process.returncode}: {last[:300]}")
    return seconds, usage.ru_utime + usage.ru_stime


# ---- main ------------------------------------------------------------------------------------------------------------


def about(options):
    """What a reader needs to repeat this. No paths."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text() if info.is_file() else "", re.M)
    files = [*sorted(ROOT.glob("methods/*.py")), *sorted(ROOT.glob("common/**/*.py")), Path(__file__).resolve()]
    waits = os.environ.get("OMP_WAIT_POLICY")  # passive: two threads on a busy machine do not spin for each other
    words = [f"OMP_WAIT_POLICY={waits}"] if waits else []
    words += [f"python benchmarks/scaling.py --threads {options.threads} --rounds {options.rounds}"]
    words += [f"--repeats {options.repeats}"]
    words += ["--tiny"] if options.tiny else []
    words += [f"--only {' '.join(options.only)}"] if options.only != list(points(False)) else []
    return {
        "command": " ".join(words), "git": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "methods", "common", "benchmarks/scaling.py")),
        "sha256": {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files},
        "device": f"{platform.machine()} {found[1] if found else ''}, {os.cpu_count()} logical CPUs",
        "threads": options.threads, "torch": torch.__version__, "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def measure_part(part, options):
    """All rounds of a part -> its rows."""
    rows = []
    for number in range(options.rounds):
        for point in points(options.tiny)[part]:
            shown = "  ".join(f"{key} {value}" for key, value in point.items() if key not in MODEL or part == "size")
            try:
                if part == "startup":
                    tries = options.repeats if point["what"] != "first step" else 1
                    found = [startup(point["script"], point["what"], options.threads) for _ in range(tries)]
                    found = dict(zip(("seconds", "cpu_seconds"), map(list, zip(*found))))
                elif part in ("ranks", "profile"):
                    found = ranks(point)
                else:
                    found = forked(point | {"part": part}, options.threads, options.repeats)
            except Problem as e:
                raise Problem(f"{part}, {shown}: {e}") from e
            rows.append({"part": part, "round": number + 1, "point": point} | found)
            tokens = found.get("useful_tokens", 1)
            print(f"{part:<11}{shown}  {statistics.median(found['seconds']) / tokens:.3g} s per "
                  f"{'token' if tokens > 1 else 'start'}  {found.get('rise_bytes', 0) / 1e6:.0f} MB", flush=True)
    return rows


def replace_rows(path, rows, parts):
    """Rows of these parts in place of the file's own, all or nothing."""
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = [row for row in old if row["part"] not in parts] + rows
    path.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(path.with_suffix(".tmp"), path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = list(points(False))
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=" ".join(parts))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a point, but for ranks")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each point, all points in turn")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions in each process")
    parser.add_argument("--tiny", action="store_true", help="an eighth of the size, to try the benchmark itself")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options, failed = parser.parse_args(argv), 0
    if min(options.threads, options.rounds, options.repeats) < 1:
        parser.error("--threads, --rounds and --repeats must be at least 1")
    if not options.out.absolute().parent.is_dir() or not Path("/proc/self/clear_refs").exists():
        parser.error("--out must be in a folder that exists, and memory is read as Linux tells it")
    before = about(options)
    for part in options.only:
        try:
            rows = measure_part(part, options)
            if about(options)["sha256"] != before["sha256"]:
                raise Problem(f"{part}: the sources changed during the run: nothing written")
            replace_rows(options.out, [row | before for row in rows], [part])
        except Problem as e:
            print(f"error: {e}", file=sys.stderr, flush=True)
            failed += 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
