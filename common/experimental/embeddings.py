"""What a policy makes of a prompt, as one vector."""

from array import array

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.batches import micro_batches, share


@torch.no_grad()
def prompt_embeddings(run, policy, groups):
    """Return the means of the policy's last hidden states over the groups' prompts, each with a 1 after it: (groups,
    D + 1) float64, on the CPU of every rank. Every rank has to call it, with the same groups."""
    prompts = []
    for number, group in enumerate(groups):
        ids = group["prompt"] + group["completions"][0]["ids"][:1]  # this one is only predicted, by the prompt's last
        completion = {"ids": ids, "scored": None}
        prompts.append({"prompt": array("i"), "completions": [completion], "number": number})
    size = policy.lm.config.get_text_config().hidden_size
    embeddings = torch.zeros(len(groups), size, dtype=torch.float64, device=run.device)
    for batch in micro_batches(run, share(run, prompts), spare=prompts[0]):
        hidden = policy(batch, ["hidden"])["hidden"].double()
        sums = hidden.new_zeros(batch["num_seqs"], size)
        sums.index_add_(0, batch["seq"], hidden)
        lengths = torch.bincount(batch["seq"], minlength=batch["num_seqs"]).clamp(min=1)
        numbers = [group["number"] for group in batch["groups"]]
        embeddings[numbers] += batch["weight"] * sums / lengths[:, None]
    dist.all_reduce(embeddings, group=run.group)
    embeddings = embeddings / run.args.tp_size  # its ranks compute the same rows
    return F.pad(embeddings, (0, 1), value=1.0).cpu()
