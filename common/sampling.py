"""Completions from a model: how prompts become sampled token ids with their log-probs.

`Sampler` holds the copy of the model that samples. It draws in a plain loop (`generate`), or with transformers'
continuous batching, which is the default on CUDA. Log-probs are fp32 and those of the distribution at --temperature.
"""
import copy
import hashlib
import logging
import math
from array import array
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from transformers import ContinuousBatchingConfig, GenerationConfig

from common.attention import PAGED, runs_flat, runs_paged
from common.decoding import ROOM, CacheDecoder, FlatDecoder
from common.head import fp32_product
from common.runtime.model import check_fits, free_bytes, materialize
from common.runtime.parallel import gather_tensors
from common.runtime.run import first_line, say

PAGE = 256  # tokens of the engine's cache that are kept, shared and dropped together
# What of a completion travels between ranks and into checkpoints. A float64 returns as the number that it was.
ROLLOUT_FIELDS = {
    "ids": torch.int32, "stopped": torch.bool,
    "sampler_logprobs": torch.float32, "old_logprobs": torch.float32, "ref_logprobs": torch.float32,
    "rewards": torch.float64, "reward": torch.float64, "advantage": torch.float64,
}


# ---- sampler -------------------------------------------------------------------------------------
class Sampler:
    """An unsharded copy of the model, in --dtype, that this rank samples with and nobody trains. It has no values until
    the script copies the policy's weights into it. lm: the model on the meta device, before Policy replaces its
    attention. stops: ids that end a completion. top_k, top_p: see `truncated`; log-probs stay those of the policy."""

    def __init__(self, run, lm, tokenizer, stops, top_k=0, top_p=1.0):
        self.run = run
        self.tokenizer = tokenizer
        self.stops = stops
        self.top_k, self.top_p = top_k, top_p
        self.engine = None
        self.lm = copy.deepcopy(lm)
        for parameter in self.lm.parameters():  # not the buffers: rotary tables stay fp32
            parameter.data = parameter.to(run.dtype)
        need = sum(parameter.nbytes for parameter in self.lm.parameters())
        check_fits(f"--model {run.args.model}: the copy that samples takes", need)
        materialize(self.lm, run.device, run.device)
        head = self.lm.get_output_embeddings()
        head.forward = partial(fp32_head, head)  # as the trainer's: logits in bfloat16 would be off by 0.03 nats

    def sample(self, groups, copies, place, greedy=False):
        """Fill every group["completions"] with `copies` samples, or with greedy ones. What the noise depends on beside
        the seed: place, ("train", number of the rollout) or ("eval",), and group["place"], where in it the group is."""
        args = self.run.args
        prompts = [group["prompt"] for group in groups]
        if self.engine and not greedy:  # it can draw, or be greedy, but not both
            sequences = self.sample_continuous(prompts, copies, (*place, groups[0]["place"]))
        else:
            sequences = []
            size = self.prompts_at_once(prompts, copies)
            cut = {"top_k": self.top_k, "top_p": self.top_p}
            for first in range(0, len(groups), size):
                part = slice(first, first + size)
                noise = None if greedy else self.noise(groups[part], copies, place)
                sequences += generate(self.lm, prompts[part], copies, noise, self.stops, args, **cut)
        for group in groups:
            group["completions"] = []
        for i, (ids, logprobs) in enumerate(sequences):
            completion = {"ids": array("i", ids), "sampler_logprobs": torch.as_tensor(logprobs)}
            completion.update(stopped=ids[-1] in self.stops, scored=None)  # None: every token is
            groups[i // copies]["completions"].append(completion)

    def noise(self, groups, copies, place):
        """Return uniform numbers (groups * copies, max_completion_length), the same however prompts are cut up."""
        args = self.run.args
        rows = []
        for group in groups:
            for k in range(copies):
                of_completion = (*place, group["place"], k)
                rows.append(uniforms(of_completion, args.seed, args.max_completion_length))
        return torch.stack(rows).to(self.run.device)

    def prompts_at_once(self, prompts, copies):
        """Return how many prompts the loop may complete together: keys and values of all their sequences take half of
        the memory that is free. The rest is for logits."""
        config = self.lm.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * head_size * self.run.dtype.itemsize
        length = max(map(len, prompts)) + self.run.args.max_completion_length
        room = length + max(ROOM, length // 2)  # by which a full buffer grows
        prompt_bytes = copies * room * token_bytes
        most = free_bytes() / 2 / prompt_bytes
        return int(max(1, min(len(prompts), most)))

    def start_engine(self):
        """Prepare transformers' continuous batching if --engine wants it. The script calls this when the policy is
        loaded, since it takes a share of the memory that is free. Pages and CUDA graphs last for the whole run."""
        args = self.run.args
        device = self.run.device.type
        if args.engine == "loop" or (args.engine == "auto" and (args.deterministic or device != "cuda")):
            return
        if not runs_paged(self.lm, device):
            say(self.run, "sampling  in the loop: the engine needs transformers 5.20 and a model on the flat road")
            return
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it warns of packages it can do without
        settings = ContinuousBatchingConfig(page_size=PAGE, max_requests_per_batch=256, return_logprobs=True)
        settings.auto_switch_to_flash = False  # which may download a kernel
        if device == "cuda":
            # The default, 0.9 of what is free, leaves no room for gradients, Adam's moments and activations. Beside
            # Qwen3-1.7B 0.3 of 80 GB hold some 170,000 tokens; what does not fit waits.
            settings.max_memory_percent = 0.3
        else:  # where it runs for tests only: two groups
            settings.num_blocks = 2 * args.num_generations * (1 + args.max_length // PAGE)
        rules = GenerationConfig(do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0)
        rules.eos_token_id = self.stops
        rules.max_new_tokens = args.max_completion_length
        self.lm.config._attn_implementation = PAGED
        try:
            self.engine = self.lm.init_continuous_batching(rules, settings)
            if self.top_k > 0 or self.top_p < 1:  # by `rules`, log-probs would be those of what is left
                self.engine.batch_processor = self.engine._create_batch_processor()
                self.engine.batch_processor.model_runner._sample = partial(sample_scores, self.top_k, self.top_p)
            self.engine.warmup()  # takes the memory and records the graphs now
        except RuntimeError as e:
            if args.engine != "auto":
                raise
            self.engine = None
            say(self.run, f"sampling  in the loop: the engine does not start here: {first_line(e)}")

    def sample_continuous(self, prompts, copies, place):
        """What `generate` returns, by the engine: all prompts in one batch, each computed once and forked. It draws
        from torch's generator: the noise depends on the seed, the place, the rank and what else is in the batch."""
        self.lm.config._attn_implementation = PAGED  # the loop may have been here
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()  # the weights were written on a stream that the engine's does not wait for
        noise = uniforms((*place, self.run.rank), self.run.args.seed, 1)
        torch.manual_seed(int(noise * 2**53))
        results = {}
        self.engine.start()
        try:
            with self.engine.pause():  # until all prompts are there: what is computed together is not up to the clock
                for i, prompt in enumerate(prompts):
                    # Forked where one token is left, which must not be the first of a page (transformers 5.23).
                    forks = 1 if len(prompt) % PAGE == 1 else copies
                    self.engine.num_return_sequences = forks
                    for k in range(copies // forks):
                        self.engine.add_request(list(prompt), request_id=f"{i:06}-{k:06}")
            for result in self.engine:
                if result.error:
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                results[result.request_id] = result
                if len(results) == len(prompts) * copies:
                    break
            else:
                raise RuntimeError("continuous batching failed: its thread is gone")
        finally:
            self.engine.stop(keep_for_next_session=True, hard_stop=True)  # its thread would outlive an error
        self.engine.batch_processor.cache.reset()  # or a later rollout finds its prompts' pages of these weights
        # In the order of the prompts: what the engine calls a fork begins with the request_id of its parent.
        return [(results[name].generated_tokens, results[name].logprobs) for name in sorted(results)]


def sample_scores(top_k, top_p, scores, output_ids):
    """In the engine's place: of scores (1, R, V), the logits over the temperature, write a token of each row, drawn
    from the truncated distribution, and its log-prob in the whole one into output_ids (2, R or more) int32. The second
    row holds the bits of fp32."""
    p = scores[0].softmax(-1)
    tokens = torch.multinomial(truncated(p, top_k, top_p), 1)
    logprobs = p.gather(1, tokens).log()
    output_ids[0, : len(tokens)].copy_(tokens[:, 0])
    output_ids[1, : len(tokens)].copy_(logprobs[:, 0].view(torch.int32))


def fp32_head(head, hidden):
    """What the linear head of a model returns for hidden states (..., D), in fp32."""
    rows = hidden.flatten(0, -2)
    logits = fp32_product(rows, head.weight).unflatten(0, hidden.shape[:-1])
    return logits if head.bias is None else logits + head.bias


# ---- the loop ------------------------------------------------------------------------------------
def uniforms(place, seed, count):
    """Return `count` float64 numbers from 0 to 1, the same for a seed and place (a tuple) on any rank, in any batch."""
    name = repr((seed, *place))
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits are what torch takes
    return torch.rand(count, generator=generator, dtype=torch.float64)


def draw(p, noise):
    """p (R, V): rows of probabilities, noise (R,): uniform. Return tokens (R,): of each row the first whose running sum
    passes noise times the sum of p. In float64, or the tail of a large vocabulary would be lost. Blocks of the
    vocabulary are summed first, so that only one block of each row needs running sums."""
    width = math.gcd(p.shape[1], 256)
    blocks = p.unflatten(1, (-1, width))  # (R, V / width, width)
    block_sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = noise[:, None] * block_sums[:, -1:]
    block = torch.searchsorted(block_sums, target).clamp(max=block_sums.shape[1] - 1)
    target = target - F.pad(block_sums, (1, 0)).gather(1, block)  # what the blocks before it leave
    inside_block = blocks.take_along_dim(block[..., None], 1)[:, 0]
    sums = inside_block.double().cumsum(-1)
    target = target.minimum(sums[:, -1:])
    place = torch.searchsorted(sums, target).clamp(max=width - 1)
    return (block * width + place)[:, 0]


def truncated(p, top_k, top_p):
    """Return the probabilities p (R, V) with 0 for all but the top_k most likely tokens of a row (0: all) and, of what
    that leaves, for all but the fewest likely ones that together hold at least the share top_p of it."""
    if top_k == 0 and top_p == 1:
        return p
    ranked, tokens = p.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = 0
    sums = ranked.cumsum(-1, dtype=torch.float64)
    more_likely = sums - ranked  # what the tokens before a token hold: 0 for the first, which always stays
    if top_p < 1:
        ranked.masked_fill_(more_likely >= top_p * sums[:, -1:], 0)
    return torch.zeros_like(p).scatter_(1, tokens, ranked)


@torch.no_grad()
def generate(lm, prompts, copies, noise, stops, args, top_k=0, top_p=1.0):
    """Return ids and log-probs (fp32, on the CPU) of `copies` completions of each prompt, those of one prompt side by
    side. Those that end leave the batch. noise: uniform (prompts * copies, max_completion_length), None: greedy."""
    kind = FlatDecoder if runs_flat(lm, lm.device.type) else CacheDecoder
    decoding = kind(lm, prompts, copies)
    stop_tokens = torch.tensor(stops, device=lm.device)
    live = decoding.rows  # the sequence that each row continues
    ids = torch.full((len(live), args.max_completion_length), -1, device=lm.device)  # -1: no token there
    logprobs = torch.zeros(ids.shape, device=lm.device)
    for t in range(args.max_completion_length):
        p = (decoding.logits.float() / args.temperature).softmax(-1)
        if noise is None:
            tokens = p.argmax(-1)
        else:
            tokens = draw(truncated(p, top_k, top_p), noise[live, t])
        ids[live, t] = tokens
        token_p = p.gather(1, tokens[:, None])[:, 0]
        logprobs[live, t] = token_p.log()
        ended = torch.isin(tokens, stop_tokens)
        if ended.all() or t + 1 == args.max_completion_length:
            break
        if ended.any():
            stay = decoding.drop(ended)
            live = live[stay]
            tokens = tokens[stay]
        decoding.step(tokens)
    lengths = (ids >= 0).sum(1).tolist()
    sequences = zip(ids.tolist(), logprobs.cpu(), lengths)
    return [(row_ids[:length], row_logprobs[:length]) for row_ids, row_logprobs, length in sequences]


# ---- rollouts as tensors -------------------------------------------------------------------------
def to_tensors(groups):
    """Return groups as a dict of tensors of one dimension: their `place` in the rollout, `lengths` of all completions,
    and ROLLOUT_FIELDS, empty where completions lack it. 8 to 16 bytes a token: its id and one to three log-probs."""
    completions = list(chain.from_iterable(group["completions"] for group in groups))
    places = [group["place"] for group in groups]
    lengths = [len(completion["ids"]) for completion in completions]
    tensors = {"place": torch.tensor(places).long(), "lengths": torch.tensor(lengths).long()}
    for name, dtype in ROLLOUT_FIELDS.items():
        parts = [torch.empty(0, dtype=dtype)]
        for completion in completions:
            if name in completion:
                parts.append(torch.as_tensor(completion[name], dtype=dtype).flatten())
        tensors[name] = torch.cat(parts)
    return tensors


def from_tensors(prompts, tensors):
    """The inverse of `to_tensors`, to the bit: return the group prompts[place] with its completions for each place, in
    order. A place that occurs again counts once: ranks that share layers hold the same. All groups have one size."""
    lengths = tensors["lengths"].tolist()
    completions = [{"scored": None} for _ in lengths]
    for name in ROLLOUT_FIELDS:
        values = tensors[name]
        if name == "ids":
            values = [array("i", ids.tolist()) for ids in values.split(lengths)]
        elif name == "rewards" and len(values):
            values = values.view(len(lengths), -1).tolist()
        elif name.endswith("logprobs") and len(values):
            values = values.split(lengths)
        else:
            values = values.tolist()
        for completion, value in zip(completions, values):
            completion[name] = value
    groups = {}
    copies = len(lengths) // max(1, len(tensors["place"]))
    for i, place in enumerate(tensors["place"].tolist()):
        members = completions[i * copies : (i + 1) * copies]
        groups[place] = {**prompts[place], "place": place, "completions": members}
    return [groups[place] for place in sorted(groups)]


def gather_groups(prompts, groups, group):
    """Return the groups of all ranks of `group`, a process group, in the order of their places. Every rank passes the
    prompts of the whole rollout, and groups of the same form or none."""
    parts = gather_tensors(to_tensors(groups), group)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return from_tensors(prompts, joined)


def set_completions(groups, name, table):
    """Set completion[name] to its number in table, (groups, copies)."""
    for group, values in zip(groups, table.tolist()):
        for completion, value in zip(group["completions"], values):
            completion[name] = value
