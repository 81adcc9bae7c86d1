"""A language-model head applied to a chunk of rows, in fp32, and what goes back through it."""
import torch
import torch.distributed as dist


def fp32_product(hidden, weight):
    """Return hidden (rows, D) times weight (V, D) transposed, in fp32 whatever the dtype of the two."""
    if hidden.is_cuda and hidden.dtype != torch.float32:  # only CUDA's products of half precision can end in fp32
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def row_log_probs(hidden, weight, bias, transform, group):
    """Return log p of a chunk, (rows, V) fp32 in memory of its own, and dz / d(h W^T + b): a number, or (rows, V)."""
    scale, cap, temperature = transform
    z = fp32_product(hidden, weight)
    if bias is not None:
        z.add_(bias)
    slope = scale / temperature
    if cap:
        tanh = z.mul_(scale / cap).tanh_()
        z = tanh * (cap / temperature)
        slope = tanh.square_().neg_().add_(1).mul_(slope)  # (1 - tanh^2) * scale / temperature
    elif slope != 1:
        z.mul_(slope)
    return log_softmax_in_place(z, group), slope


def log_softmax_in_place(z, group):
    """Return log softmax of z, in place, over the columns of all ranks."""
    if not group:
        for part in row_pieces(z):
            part.copy_(part.log_softmax(-1))
        return z
    highest = z.amax(-1, keepdim=True)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    z.sub_(highest)
    total = torch.cat([part.exp().sum(-1, keepdim=True) for part in row_pieces(z)])
    dist.all_reduce(total, group=group)
    return z.sub_(total.log_())


def row_pieces(z):
    """Return z as sixteen pieces of rows. What is computed from one piece at a time needs no second chunk of memory."""
    return z.split(max(1, len(z) // 16))


class HeadGradients:
    """The gradients of a head's hidden states, weight and bias, or None where `needed` is false, by chunks of rows."""

    def __init__(self, hidden, weight, bias, needed):
        self.hidden, self.weight = hidden, weight
        self.d_hidden = torch.zeros_like(hidden)
        self.d_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.d_bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] else None

    def add(self, d_z, slope, chunk):
        """Add a chunk's d loss / d z, which is overwritten. slope: what `row_log_probs` returned with the chunk."""
        hidden = self.hidden[chunk]
        half_on_cuda = hidden.is_cuda and hidden.dtype != torch.float32
        # d loss / d (h W^T + b): one slope for all logits, or with a cap one for each
        if torch.is_tensor(slope) or slope != 1:
            d_z.mul_(slope)
        if half_on_cuda:
            d_z = d_z.to(hidden.dtype)
        self.d_hidden[chunk] = d_z @ self.weight.to(d_z.dtype)
        if self.d_bias is not None:
            self.d_bias += d_z.sum(0, dtype=torch.float32)
        if self.d_weight is not None and half_on_cuda:
            torch.addmm(self.d_weight, d_z.T, hidden, out_dtype=torch.float32, out=self.d_weight)
        elif self.d_weight is not None:
            self.d_weight.addmm_(d_z.T, hidden.float())

    def all(self):
        return self.d_hidden, self.d_weight, self.d_bias
