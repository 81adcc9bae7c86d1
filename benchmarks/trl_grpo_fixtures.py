"""TRL's own GRPO, GMPO and RLOO losses and gradients on numbers that are written down, for tests/test_grpo_losses.py.

    PYTHON benchmarks/trl_grpo_fixtures.py     (PYTHON: of an environment with TRL 1.16.0)

Writes tests/fixtures/trl_grpo.json: the versions, a batch of four completions, and for each case our flags, TRL's loss
and its gradient by every log-prob. No trainer is started: `_compute_loss` is called on a trainer without an __init__,
whose model returns given log-probs, in float64.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.experimental.gmpo import GMPOTrainer

VERSION, TARGET = "1.16.0", Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "trl_grpo.json"
LENGTHS, ADVANTAGES, LIMIT, PROMPT = [3, 1, 6, 4], [1.5, -0.7, -1.1, 0.4], 8, 2
SEQUENCE = {"importance_sampling_level": "sequence"}
CASES = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")),
    *({"loss_type": name, "epsilon_high": 0.28} for name in ("grpo", "dapo", "gmpo")),
    *({"loss_type": "cispo", "epsilon_high": cap} for cap in (1.2, 5.0)),
    *({"loss_type": name, "delta": 1.6} for name in ("grpo", "dapo")),
    *({"loss_type": name, "epsilon": 0.05} | SEQUENCE for name in ("grpo", "luspo")),
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.5, "vespo_k_neg": 2.5, "vespo_lambda_neg": 0.5},
    *({"loss_type": name, "off_policy_mask_threshold": 0.1} for name in ("dapo", "vespo")),
    {"loss_type": "cispo", "epsilon_high": 3.0, "off_policy_mask_threshold": 0.1},
    *({"loss_type": name, "beta": 0.3} for name in ("grpo", "dapo", "dr_grpo", "sapo", "gmpo")),
    *({"loss_type": name, "beta": 0.3, "use_bias_correction_kl": True} for name in ("grpo", "dapo")),
    {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True} | SEQUENCE,
    *({"loss_type": name, "entropy_coef": 0.2} for name in ("grpo", "dapo")),
    *({"importance_sampling_mode": mode, "beta": 0.3} for mode in
      ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")),
    {"rloo": True}, {"rloo": True, "epsilon_high": 0.6},
]  # fmt: skip
DEFAULTS = {"loss_type": "dapo", "epsilon": 0.2, "beta": 0.0, "importance_sampling_level": "token", "delta": None,
            "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
            "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "off_policy_mask_threshold": None, "entropy_coef": 0.0,
            "use_bias_correction_kl": False}  # fmt: skip
BOUNDS = 0.8, 1.4  # of importance_sampling_mode's weights


def make_batch():
    """Per completion: log-probs of the policy, of the one that sampled as trainer and sampler saw it, of the reference,
    and entropies. Rounded, so that the file holds the very numbers that TRL was given."""
    generator, batch = torch.Generator().manual_seed(0), {}
    for name, spread in ("old", 1.0), ("new", 0.35), ("sampler", 0.25), ("ref", 0.5), ("entropy", 1.0):
        noise = [spread * torch.randn(n, generator=generator, dtype=torch.float64) for n in LENGTHS]
        start = [torch.full((n,), -2.5, dtype=torch.float64) for n in LENGTHS] if name == "old" else batch.get("old")
        rows = [x.abs() for x in noise] if name == "entropy" else [a + x for a, x in zip(start, noise)]
        batch[name] = [torch.tensor([round(v, 6) for v in row.tolist()], dtype=torch.float64) for row in rows]
    return batch


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def one_process(x, **_):
    """What gathers and reduces over ranks."""
    return x


def trl_loss(case, batch):
    """-> TRL's loss, its gradient by log-probs and by entropies, as lists of the tokens of all completions."""
    flags = DEFAULTS | case
    kind = trl.RLOOTrainer if case.get("rloo") else GMPOTrainer if flags["loss_type"] == "gmpo" else trl.GRPOTrainer
    trainer = object.__new__(kind)
    trainer.accelerator = SimpleNamespace(num_processes=1, gather=one_process, reduce=one_process, sync_gradients=True)
    trainer.model, trainer._metrics = SimpleNamespace(training=True), {"train": defaultdict(list)}
    trainer.args = SimpleNamespace(steps_per_generation=1, **flags)
    vars(trainer).update({k: v for k, v in flags.items() if k not in ("epsilon", "rloo")})
    trainer.epsilon_low, trainer.epsilon_high = flags["epsilon"], flags.get("epsilon_high", flags["epsilon"])
    trainer.current_gradient_accumulation_steps, trainer.max_completion_length = 1, LIMIT
    trainer.top_entropy_quantile, trainer.aux_loss_enabled, trainer.use_adaptive_entropy = 1.0, False, False
    trainer._entropy_bonus_enabled = flags["entropy_coef"] != 0
    mode = case.get("importance_sampling_mode")
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = mode is not None
    logprobs, entropies = padded(batch["new"]).requires_grad_(), padded(batch["entropy"]).requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropies, None)
    mask = padded([torch.ones(n, dtype=torch.long) for n in LENGTHS])
    ones = torch.ones(len(LENGTHS), PROMPT, dtype=torch.long)
    inputs = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": torch.zeros_like(mask)}
    inputs |= {"completion_mask": mask, "num_items_in_batch": mask.sum()}
    inputs |= {"advantages": torch.tensor(ADVANTAGES, dtype=torch.float64)}
    inputs |= {"old_per_token_logps": padded(batch["old"]), "ref_per_token_logps": padded(batch["ref"])}
    inputs |= {"sampling_per_token_logps": padded(batch["sampler"])}
    inputs["old_logps"] = (padded(batch["old"]) * mask).sum(1)  # RLOO's
    if mode:  # what TRL's generation step hands over: inline there, so these four lines follow it
        gap = (padded(batch["old"]) - padded(batch["sampler"])) * mask
        weight = (gap.sum(1, keepdim=True) if mode.startswith("sequence") else gap).exp()
        inside = (weight >= BOUNDS[0]) & (weight <= BOUNDS[1])
        inputs["importance_sampling_ratio"] = weight.clamp(*BOUNDS) if "truncate" in mode else weight * inside
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    zero = torch.zeros_like(entropies)
    gradients = logprobs.grad, zero if entropies.grad is None else entropies.grad
    return [loss.item(), *(g[mask.bool()].tolist() for g in gradients)]


def main():
    if trl.__version__ != VERSION:
        sys.exit(f"error: TRL is {trl.__version__}, the fixtures are of {VERSION}. Install trl=={VERSION}.")
    batch, cases = make_batch(), []
    for case in CASES:
        loss, gradient, by_entropy = trl_loss(case, batch)
        more = dict(zip(("importance_sampling_clip_min", "importance_sampling_clip_max"), BOUNDS))
        flags = case | (more if "importance_sampling_mode" in case else {})
        cases.append({"flags": flags, "loss": loss, "gradient": gradient, "entropy_gradient": by_entropy})
    head = {"trl": trl.__version__, "torch": torch.__version__, "lengths": LENGTHS, "advantages": ADVANTAGES}
    head |= {"max_completion_length": LIMIT} | {name: torch.cat(rows).tolist() for name, rows in batch.items()}
    lines = ",\n".join(json.dumps(case) for case in cases)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(head)[:-1] + ', "cases": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
