"""One training run, or one loss, of TRL 1.16.0. Run by trl_parity.py and versus_trl.py with the python of TRL's own
environment:

    PYTHON benchmarks/trl_worker.py SPEC.json

SPEC: method (sft, reward, dpo, kto, grpo, rloo, orpo, distillation), model (folder), for distillation teacher (folder),
data (.jsonl whose rows are used in that order), config (arguments of TRL's config class), result (file to write) and
for grpo and rloo perhaps replay (a samples.jsonl: completions and rewards are taken from it instead of being sampled)
or batch (a .json file with completions, rewards, old and reference log-probs: loss and gradients instead of a training
run). search: a list of arguments to try one after the other, each on top of config. Prints a line "step N" after every
optimizer step: what versus_trl.py times.

Nothing but `even_digits` and `timed` may be needed by the other environment, so everything heavy is imported where it
is used.
"""

import json
import os
import sys
import time
from pathlib import Path

ONLINE = ("grpo", "rloo")  # methods that sample

# what is timed inside a step, by the name that versus_trl.py gives it
PARTS = {"_generate_single_turn": "rollout", "_calculate_rewards": "reward", "_precompute_ref_logps": "precompute",
         "_get_per_token_logps_and_entropies": "logprobs"}  # fmt: skip


def even_digits(prompts, completions, **_):
    """A reward that both sides can compute, cheap and seldom the same for a whole group: the share of even digits. In
    64ths: TRL takes group means in fp32, and where a group's rewards are all 0.8, say, their rounding error over the
    1e-4 that is added to the deviation is an advantage of 6e-4."""
    texts = [c[-1]["content"] if isinstance(c, list) else c for c in completions]
    digits = [[int(x) for x in text if x in "0123456789"] for text in texts]
    return [round(64 * sum(x % 2 == 0 for x in xs) / max(1, len(xs))) / 64 for xs in digits]


def timed(function, part, events, wanted=lambda: True):
    """`function`, noting [part, start, wall seconds, CPU seconds] of every call for which wanted() holds."""
    def wrapper(*args, **kwargs):
        wall, busy = time.perf_counter(), time.process_time()
        result = function(*args, **kwargs)
        if wanted():
            events.append([part, wall, time.perf_counter() - wall, time.process_time() - busy])
        return result
    return wrapper


def make_trainer(spec, **kwargs):
    """The trainer of spec["method"], rows in the order of the file, with a record of every logged step."""
    import importlib

    import transformers
    import trl
    from datasets import Dataset
    from torch import is_grad_enabled
    from torch.utils.data import SequentialSampler

    class Record(transformers.TrainerCallback):
        """Logged values as TRL logs them (transformers 5 does not round the loss)."""

        def __init__(self):
            self.steps, self.at, self.events = [], {}, []

        def on_log(self, args, state, control, logs=None, **_):
            if "grad_norm" in logs:
                self.steps.append({k: v for k, v in logs.items() if isinstance(v, (int, float))})
                self.at[state.global_step] = time.perf_counter(), time.process_time()
                print(f"step {state.global_step}", flush=True)

    name = {"reward": "Reward", "distillation": "Distillation"}.get(spec["method"], spec["method"].upper())
    package = importlib.import_module("trl.experimental.orpo") if spec["method"] == "orpo" else trl
    base = getattr(package, f"{name}Trainer")

    class InOrder(base):
        def _get_train_sampler(self, dataset=None):
            if spec["method"] in (*ONLINE, "distillation"):
                # It has to repeat prompts; shuffle_dataset=False turns the shuffling off.
                return super()._get_train_sampler(dataset)
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

        def _generate_single_turn(self, prompt_ids, *args, **more):
            if "replay" not in spec:
                return super()._generate_single_turn(prompt_ids, *args, **more)
            lines = self.replay[self.used : self.used + len(prompt_ids)]
            self.used += len(prompt_ids)
            for ids, line in zip(prompt_ids, lines, strict=True):
                assert self._tokenizer.decode(ids) == line["prompt"], "the replayed rollout is of other prompts"
            self.rewards = [line["reward"] for line in lines]
            encoded = [self._tokenizer(line["completion"], add_special_tokens=False)["input_ids"] for line in lines]
            for ids, line in zip(encoded, lines):
                assert self._tokenizer.decode(ids) == line["completion"], "text does not survive tokenisation"
            return encoded if spec["method"] == "rloo" else (encoded, None)

    record = Record()
    rows = [json.loads(line) for line in Path(spec["data"]).read_text().splitlines()]
    if spec["method"] == "distillation":
        InOrder._generate_single_turn = given_completions(rows)
        kwargs["teacher_model"] = spec["teacher"]
    if spec["method"] == "orpo":
        InOrder.concatenated_forward = with_our_first_term(base.concatenated_forward)
    for function, part in PARTS.items() if spec["method"] != "distillation" else ():
        if hasattr(base, function):  # the pass with gradients is part of the update
            only = (lambda: not is_grad_enabled()) if part == "logprobs" else (lambda: True)
            setattr(InOrder, function, timed(getattr(InOrder, function), part, record.events, only))
    if "replay" in spec:
        lines = [json.loads(line) for line in Path(spec["replay"]).read_text().splitlines()]
        InOrder.replay, InOrder.used = lines, 0
        kwargs["reward_funcs"] = lambda prompts, completions, **_: trainer.rewards
    elif spec["method"] in ONLINE:
        kwargs.setdefault("reward_funcs", even_digits)
    common = {  # both sides: fp32, linear decay from the first step, no warmup, no weight decay, clipping at 1
        "output_dir": spec["scratch"], "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "bf16": False, "save_strategy": "no", "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "seed": 42,
    }  # fmt: skip
    config = getattr(package, f"{name}Config")(**common | spec["config"])
    dataset = Dataset.from_list(rows)
    fresh = f"candidate{spec.get('number', 0)}"  # or a candidate would find what the one before it precomputed
    dataset = dataset.map(lambda row: row, new_fingerprint=fresh)
    trainer = InOrder(model=spec["model"], args=config, train_dataset=dataset, callbacks=[record], **kwargs)
    if reference := getattr(trainer, "ref_model", None) if spec["method"] in ("dpo", "kto") else None:
        reference.forward = timed(reference.forward, "logprobs", record.events)
    return trainer, record


def given_completions(rows):
    """What stands for DistillationTrainer's sampling: the completions of the next rows, as its chat template has
    them."""
    remaining = iter(rows)

    def next_completions(trainer, prompt_ids, *_, **__):
        completions = []
        for prompt, row in zip(prompt_ids, remaining):  # in this order, or zip would take a row too many
            chat = row["prompt"] + row["completion"]
            ids = trainer._tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
            assert ids[: len(prompt)] == prompt, "the prompt is not how the whole row begins"
            completions.append(ids[len(prompt) :])
        return completions

    return next_completions


def with_our_first_term(concatenated_forward):
    """ORPOTrainer's forward, but what it returns last, the first term of the loss, is our script's: the mean over pairs
    of -log P(chosen), which it returns first. Its own is over the tokens of the prompt, too."""
    def forward(trainer, model, batch):
        chosen, *others, _ = concatenated_forward(trainer, model, batch)
        return chosen, *others, -chosen.mean()
    return forward


def search(spec, result):
    """Train with every candidate, and write what is known after each: the next one may be the end of the process."""
    import gc

    result["search"] = []
    for number, candidate in enumerate(spec["search"]):
        try:
            trainer, record = make_trainer(spec | {"config": spec["config"] | candidate, "number": number})
            trainer.train()
            found = {"steps": record.steps, "at": record.at, "events": record.events}
        except Exception as e:  # a setting that does not work here is an answer, too
            found = {"error": f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0][:200]}"}
        result["search"].append(found)
        trainer = record = None
        gc.collect()
        write(spec, result)


def write(spec, result):
    Path(spec["result"] + ".tmp").write_text(json.dumps(result))
    os.replace(spec["result"] + ".tmp", spec["result"])


def scored_ids(trainer, spec, limit):
    """For the first rows, every sequence with the ids that TRL scores: [[ids, scored positions], ...], chosen before
    rejected. Taken from the collated batch, the last thing that the loss sees."""
    import torch

    sequences = []
    for i in range(min(limit, len(trainer.train_dataset))):
        batch = trainer.data_collator([trainer.train_dataset[i]])
        if spec["method"] == "reward":  # the classifier reads one token: the last
            real = batch["attention_mask"]
            batch["completion_mask"] = torch.arange(real.shape[1]) == real.sum(1, keepdim=True) - 1
        mask = batch["completion_mask"] == 1 if "completion_mask" in batch else batch["labels"] != -100
        for ids, real, scored in zip(batch["input_ids"], batch["attention_mask"], mask):
            keep = real.bool()
            sequences.append([ids[keep].tolist(), scored[keep].nonzero()[:, 0].tolist()])
    return sequences


def instead_of(own, policy, given):
    """TRL's function `own` of a model's log-probs, which answers from `given`, old or ref, what is there."""
    def wrapper(model, *args, **kwargs):
        name = "old" if model is policy else "ref"
        return (given[name], None, None) if name in given else own(model, *args, **kwargs)
    return wrapper


def online_batch(spec):
    """Loss and gradients of one batch per case, through TRL's own path: its generation step is given the completions
    and rewards, and computes masks, counts and advantages. Old and reference log-probs are ours: RLOO's generation step
    is given them, as it needs them for the KL in the reward; GRPO's result gets them, as its loss does."""
    import torch
    from safetensors.torch import save_file
    from trl.trainer.utils import pad

    batch, results = json.loads(Path(spec["batch"]).read_text()), []
    completions = [ids for group in batch["groups"] for ids in group["completions"]]
    outcome = completions if spec["method"] == "rloo" else (completions, None)
    rewards = [reward for group in batch["groups"] for reward in group["rewards"]]
    rows = [json.loads(line) for line in Path(spec["data"]).read_text().splitlines()]
    for number, case in enumerate(batch["cases"]):
        local = spec | {"config": spec["config"] | case["trl"]}
        trainer, _ = make_trainer(local, reward_funcs=lambda prompts, completions, **_: rewards)
        trainer._generate_single_turn = lambda prompt_ids, *_, **__: outcome
        trainer.model.train()
        given = {name: pad([torch.tensor(x) for x in batch[name]], padding_value=0.0, padding_side="right")
                 for name in ("old", "ref") if case[name]}  # fmt: skip
        own = trainer._get_per_token_logps_and_entropies
        if spec["method"] == "rloo":
            trainer._get_per_token_logps_and_entropies = instead_of(own, trainer.model, given)
        trainer.current_gradient_accumulation_steps = 1  # set by the training loop, which does not run here
        size = trainer.num_generations
        inputs = trainer._generate_and_score_completions([row for row in rows for _ in range(size)])
        wanted = [ids for group in batch["groups"] for ids in [group["prompt"]] * size]
        found = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"])]
        assert found == wanted, "the two sides tokenise a prompt differently"
        trainer._get_per_token_logps_and_entropies = own
        if spec["method"] == "grpo":
            for name in "old", "ref":
                inputs.pop(f"{name}_per_token_logps", None)
                inputs |= {f"{name}_per_token_logps": given[name]} if name in given else {}
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        save_file({n: p.grad.contiguous() for n, p in trainer.model.named_parameters()}, f"{spec['result']}.{number}")
        results.append({"loss": loss.item(), "advantages": inputs["advantages"].tolist()})
    return results


def main(spec):
    import torch
    import transformers
    import trl

    transformers.utils.logging.disable_progress_bar()
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    result = {"versions": versions | {"threads": torch.get_num_threads()}}
    if "batch" in spec:
        result["cases"] = online_batch(spec)
    elif "search" in spec:
        search(spec, result)
    else:
        trainer, record = make_trainer(spec)
        if spec.get("tokens"):
            result["tokens"] = scored_ids(trainer, spec, spec["tokens"])
        trainer.train()
        result |= {"steps": record.steps, "events": record.events}
    write(spec, result)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
