"""TRL's own SFT losses and averaged weights on numbers that are written down, for tests/test_sft_losses.py.

    PYTHON benchmarks/trl_sft_fixtures.py     (PYTHON: of an environment with TRL 1.16.0)

Writes tests/fixtures/trl_sft.json: the versions; logits and labels of a padded micro-batch; for each case our flags,
the tokens of the step (null: of this micro-batch), TRL's loss and its gradient by every logit; and for each case of
BEMA our flags and what BEMACallback makes of three weights after every step of a path. No trainer is started:
`compute_loss` is called on one without an __init__, with a model that returns given logits. All is float64.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from transformers.trainer_pt_utils import LabelSmoother

VERSION, TARGET = "1.16.0", Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "trl_sft.json"
LABELS = [[-100, -100, 3, 0, 4], [-100, 1, 1, 2, -100], [-100, -100, -100, 2, -100]]
VOCABULARY = 5
CASES = [({"loss_type": name}, tokens) for name in ("nll", "dft") for tokens in (None, 17)]
CASES += [({"label_smoothing_factor": e}, tokens) for e in (0.1, 0.5) for tokens in (None, 17)]
STEPS = 9
BEMA = [{}, {"update_freq": 1}, {"update_freq": 2, "update_after": 3}, {"update_freq": 1, "lag": 3, "multiplier": 0.5},
        {"update_freq": 2, "ema_power": 0.0}, {"update_freq": 2, "bias_power": 8.0},
        {"update_freq": 1, "ema_power": 2.0, "min_ema_multiplier": 0.3}]  # fmt: skip


class Output(dict):
    """LabelSmoother reads a dictionary, compute_loss attributes."""

    __getattr__ = dict.__getitem__


def one_process(x):
    """What gathers over ranks."""
    return x


def trl_loss(flags, tokens, logits):
    """-> TRL's loss and its gradient by the logits."""
    trainer, labels = object.__new__(trl.SFTTrainer), torch.tensor(LABELS)
    epsilon = flags.get("label_smoothing_factor", 0.0)
    trainer.args = SimpleNamespace(loss_type=flags.get("loss_type", "nll"), average_tokens_across_devices=True)
    trainer.label_smoother = LabelSmoother(epsilon) if epsilon else None
    trainer.compute_loss_func, trainer.aux_loss_enabled, trainer._tp_size = None, False, 1
    trainer.get_tp_size = lambda: 1
    trainer.accelerator = SimpleNamespace(parallelism_config=None, num_processes=1, gather_for_metrics=one_process)
    trainer._metrics, trainer._total_train_tokens = {"train": defaultdict(list)}, 0
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)

    mask, target = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    logp = logits[:, :-1].log_softmax(-1).gather(2, target[..., None])[..., 0].masked_fill(~mask, 0.0)
    zeros = torch.zeros_like(logp)
    out = Output(logits=logits, log_probs=logp, label_mask=mask, entropy=zeros, is_top1=zeros)
    trainer.model = SimpleNamespace(training=True)
    inputs = {"input_ids": labels, "labels": labels, "attention_mask": torch.ones_like(labels)}
    items = None if tokens is None else torch.tensor(tokens)
    loss = trainer.compute_loss(lambda **_: out, inputs, num_items_in_batch=items)
    loss.backward()
    return loss.item(), logits.grad.tolist()


class Weights(torch.nn.Module):
    """What BEMACallback needs of a model: a config to build another one with."""

    def __init__(self, config=None):
        super().__init__()
        self.config, self.w = config, torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))


def averages(flags, path):
    """-> the averaged weights at the start and after every step of the path."""
    model, callback = Weights(), trl.BEMACallback(**{"update_freq": 4} | flags)
    model.w.data.copy_(path[0])
    callback.on_train_begin(None, None, None, model)
    out = [callback.running_model.w.tolist()]
    for step, weights in enumerate(path[1:], 1):
        model.w.data.copy_(weights)
        callback.on_step_end(None, SimpleNamespace(global_step=step), None, model)
        out.append(callback.running_model.w.tolist())
    return out


def main():
    if trl.__version__ != VERSION:
        sys.exit(f"error: TRL is {trl.__version__}, the fixtures are of {VERSION}. Install trl=={VERSION}.")
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(len(LABELS), len(LABELS[0]), VOCABULARY, generator=generator, dtype=torch.float64)
    path = torch.randn(STEPS + 1, 3, generator=generator, dtype=torch.float64).cumsum(0)
    logits, path = ((1000 * x).round().div(1000).tolist() for x in (logits, path))
    cases = []
    for flags, tokens in CASES:
        loss, gradient = trl_loss(flags, tokens, logits)
        cases.append({"flags": flags, "tokens": tokens, "loss": loss, "gradient": gradient})
    bema = [{"flags": {"update_freq": 4} | flags, "weights": averages(flags, torch.tensor(path, dtype=torch.float64))}
            for flags in BEMA]  # fmt: skip
    head = {"trl": trl.__version__, "torch": torch.__version__, "labels": LABELS, "logits": logits, "path": path}
    parts = [f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for key, rows in
             (("cases", cases), ("bema", bema))]  # fmt: skip
    TARGET.write_text(json.dumps(head)[:-1] + ",\n" + ",\n".join(parts) + "}\n")
    json.loads(TARGET.read_text())


if __name__ == "__main__":
    main()
