"""How far a student's distribution over the vocabulary is from a teacher's, and the gradient of that, chunk by chunk.

logp and logq, (rows, V) in fp32, are the log-probs of student and teacher over the columns that both have, for a chunk
of scored tokens: ScoredHead in common/logprobs.py calls this. Under tensor parallelism they are this rank's columns.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class Teacher:
    """What a policy is compared with, and how: a frozen head, which backward needs when the teacher's own layers are
    sharded. D' is the teacher's hidden size."""

    weight: torch.Tensor  # (V, D') in --dtype
    bias: torch.Tensor | None
    transform: tuple  # of its logits, see ScoredHead
    beta: float
    top_k: int = 0  # tokens that count by themselves, see `merged`; 0: all
    alone: bool = False  # only the student's top_k tokens count, see `renormalised`
    hidden: torch.Tensor | None = None  # (M, D'), of a batch


def divergence(logp, logq, teacher):
    """Return the generalised Jensen-Shannon divergence of each row (rows,), with m = beta q + (1 - beta) p (Agarwal et
    al. 2023, https://arxiv.org/abs/2306.13649, section 2):

        beta KL(q || m) + (1 - beta) KL(p || m),   KL(q || p) at beta 0,   KL(p || q) at beta 1"""
    logp, logq = renormalised(logp, logq, teacher)
    merged_p, merged_q, logm = merged(logp, logq, teacher)
    out = torch.zeros_like(logp[:, 0])
    if teacher.beta < 1:
        out += (teacher.beta or 1.0) * torch.linalg.vecdot(logq.exp(), merged_q - logm)
    if teacher.beta > 0:
        out += student_share(teacher) * torch.linalg.vecdot(logp.exp(), merged_p - logm)
    return out


def divergence_slope(logp, logq, teacher, group):
    """Return d divergence / d z (rows, V), z the student's logits: (1 - beta) p [log(p / m) - KL(p || m)], without the
    factor at beta 1, and p - q at beta 0. Tokens of a tail share its ratio, and the formulas stay as they are."""
    logp, logq = renormalised(logp, logq, teacher)
    merged_p, merged_q, logm = merged(logp, logq, teacher)
    if teacher.beta == 0:
        return logp.exp() - (logp + merged_q - logm).exp()  # p - p q / m, and m is p
    ratio = merged_p - logm
    p = logp.exp()
    mean = torch.linalg.vecdot(p, ratio)[:, None]
    if group:
        dist.all_reduce(mean, group=group)
    return student_share(teacher) * p * (ratio - mean)


def student_share(teacher):
    """Return the factor of KL(p || m). At beta 1, where m is q, the factor 1 - beta would leave nothing."""
    return 1.0 if teacher.beta == 1 else 1.0 - teacher.beta


def renormalised(logp, logq, teacher):
    """Return log p and log q given that the token is one of the student's top_k likeliest, if these count alone (as in
    TRL 1.16's SDFTTrainer). The others' probability is 0, and its logarithm a number that can be subtracted."""
    if not (teacher.alone and teacher.top_k):
        return logp, logq
    others = torch.ones_like(logp, dtype=torch.bool).scatter_(1, logp.topk(teacher.top_k).indices, False)
    return [x.masked_fill(others, -1e9).log_softmax(-1) for x in (logp, logq)]


def merged(logp, logq, teacher):
    """Return log p, log q and log m, (rows, V) each. With top_k all but some tokens count as one, the tail: in its
    place each of them has the summed probability. At beta 0 the top_k likeliest tokens of the teacher count by
    themselves, at beta 1 those of the student, between those of both (as in TRL 1.16's IWOPDTrainer)."""
    beta = teacher.beta
    if teacher.top_k and not teacher.alone:
        single = torch.zeros_like(logp, dtype=torch.bool)
        if beta < 1:
            single.scatter_(1, logq.topk(teacher.top_k).indices, True)
        if beta > 0:
            single.scatter_(1, logp.topk(teacher.top_k).indices, True)
        tail_p, tail_q = [x.masked_fill(single, -math.inf).logsumexp(-1, keepdim=True) for x in (logp, logq)]
        logp, logq = logp.where(single, tail_p), logq.where(single, tail_q)
    logm = logp if beta == 0 else logq
    if 0 < beta < 1:
        logm = torch.logaddexp(logq + math.log(beta), logp + math.log(1 - beta))
    return logp, logq, logm
