# Copyright 2026 The modeling-mimo authors.
#
# Licensed under the MIT License (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://opensource.org/license/mit
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What text, vision and audio share: norm, gated MLP, rotary application and the one attention primitive."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN


# query rows per step of masked global attention, which bounds the mask at 512 x keys instead of queries x keys, and of
# sliding attention, whose buffers then stay small enough to be memory that was used before instead of new pages
QUERY_BLOCK = 512

# columns added to queries and keys for the subtracted estimate: not one, since products like whole vectors
MORE_COLUMNS = 8

# rows of a score block in `global_attention_by_matmul`, and how many of the first keys its row estimate looks at
SCORE_ROWS = 1024
SAMPLED_KEYS = 64

# queries of one step of drafting: three drafts behind a token
FEW_QUERIES = 4

# keys of one product while decoding
FEW_KEYS, LONGEST_SEGMENT = 512, 16384


class MiMoV2RMSNorm(nn.Module):
    """Root mean square norm in float32; the weight multiplies after the cast back, as in the publisher's code."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * states.to(hidden_states.dtype)


class MiMoV2MLP(nn.Module):
    """Gated MLP: `down(act(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def apply_rotary_(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first `cos.shape[-1]` dims of `states` [B, heads, S, D] in halves (NeoX), in place.

    `cos` and `sin`: [B or 1, S, rotary dims], of the frequencies written twice side by side. In place because two
    thirds of a query or key pass through; copying them costs more than the rotation.
    """
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    first, second = states[..., :half], states[..., half : 2 * half]
    turned = torch.addcmul(first * cos, second, sin, value=-1)
    second.copy_(torch.addcmul(second * cos, first, sin))
    first.copy_(turned)
    return states


def causal_mask(
    key_mask: torch.Tensor | None, query_length: int, key_length: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """Which key each query sees, [B or 1, 1, queries, keys] bool.

    The last query is aligned with the last key. `key_mask`: [B, keys] bool, False for padding, None for no padding.
    `window`: number of keys a query sees, itself included.
    """
    queries = torch.arange(key_length - query_length, key_length, device=device)[:, None]
    keys = torch.arange(key_length, device=device)[None, :]
    visible = keys <= queries
    if window is not None:
        visible = visible & (keys > queries - window)
    visible = visible[None, None]
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def bool_mask(explicit_mask: torch.Tensor) -> torch.Tensor:
    """A mask [B or 1, 1, queries, keys], bool or additive, as bool."""
    if explicit_mask.dtype == torch.bool:
        return explicit_mask
    # additive masks mark hidden keys by the smallest number of their dtype
    return explicit_mask > torch.finfo(explicit_mask.dtype).min / 2


def softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Float32 softmax over the last dim of `scores` [B, heads, queries, keys], -inf where a key is not seen.

    `sinks` [heads] is one more logit per head that takes probability and gives no value. A query that sees no key
    gets zeros, never NaN.
    """
    top = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.float().view(1, -1, 1, 1)
        top = torch.maximum(top, sinks)
    top = top.clamp(min=torch.finfo(torch.float32).min).detach()
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return weights / total.clamp(min=torch.finfo(torch.float32).tiny)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention written out: the oracle for the fast path, and the one that returns attention weights.

    Args:
        query: [B, heads, queries, D]. key: [B, kv heads, keys, D]. value: [B, kv heads, keys, Dv].
        attention_mask: [B, keys], nonzero for real keys; or [B or 1, 1, queries, keys] with causality and window
            already in it, bool or additive; or None.
        s_aux: sink logits [heads] or None.

    Returns:
        Output [B, queries, heads, Dv] and weights [B, heads, queries, keys] (without the sink's share).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = bool_mask(attention_mask)
    else:
        key_mask = None if attention_mask is None else attention_mask.bool()
        attention_mask = causal_mask(key_mask, query.shape[2], key.shape[2], sliding_window, query.device)
    weights = softmax_with_sinks(scores.masked_fill(~attention_mask, -math.inf), s_aux)
    weights = F.dropout(weights, p=dropout, training=module.training).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


class FlashWithSinks(torch.autograd.Function):
    """PyTorch's CPU flash kernel with values of another width than keys, and sinks merged through the log-sum-exp.

    A sink adds exp(sink) to the softmax denominator, so `out * sigmoid(lse - sink)` is exact. The kernel's backward
    is the exact one as well when it is handed the merged output and the merged log-sum-exp.
    """

    @staticmethod
    def forward(ctx, query, key, value, sinks, mask, is_causal, scaling):
        # the kernel wants one head dim; zero columns change nothing
        padding = (0, key.shape[-1] - value.shape[-1])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, F.pad(value, padding), 0.0, is_causal, attn_mask=mask, scale=scaling
        )
        out = out[..., : value.shape[-1]]
        if sinks is not None:
            sink = sinks.to(lse.dtype).view(1, -1, 1)
            out = (out * torch.sigmoid(lse - sink)[..., None]).to(out.dtype)
            lse = torch.logaddexp(lse, sink)
        ctx.save_for_backward(query, key, value, sinks, mask, out, lse)
        ctx.is_causal, ctx.scaling, ctx.padding = is_causal, scaling, padding
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, sinks, mask, out, lse = ctx.saved_tensors
        padded = [F.pad(tensor, ctx.padding) for tensor in (grad, value, out)]
        grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            padded[0], query, key, *padded[1:], lse, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scaling
        )
        grad_sinks = None
        if sinks is not None:
            share = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse)
            grad_sinks = -(share * (grad.to(lse.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return grad_query, grad_key, grad_value[..., : value.shape[-1]], grad_sinks, None, None, None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One kernel call: [B, heads, queries, D] x [B, kv heads, keys, D] -> [B, heads, queries, Dv].

    `visible`: [B or 1, 1, queries, keys] bool or None. `is_causal` needs as many queries as keys and no `visible`.
    """
    if query.device.type == "cpu":
        mask = None
        if visible is not None:
            mask = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -math.inf)
            mask = mask.expand(query.shape[0], -1, -1, -1)
        return FlashWithSinks.apply(query, key, value, sinks, mask, is_causal, scaling)
    if sinks is None:
        return attend_without_sinks(query, key, value, visible, is_causal, scaling)
    # no fused kernel that PyTorch ships takes sinks off the CPU; the callers hand over short key blocks only
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2)).float() * scaling
    if is_causal:
        visible = causal_mask(None, query.shape[2], key.shape[2], None, query.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return softmax_with_sinks(scores, sinks).to(value.dtype) @ value.repeat_interleave(groups, dim=1)


def attend_without_sinks(query, key, value, visible, is_causal, scaling) -> torch.Tensor:
    """`attend` by PyTorch's fused kernels of the device, which never see a queries x keys matrix.

    Values are padded to the width of keys, which the flash kernels want. With a mask, the heads of a KV group become
    more query rows, since the kernel that takes masks knows no grouped heads. A row that sees no key gives zeros.
    """
    width = value.shape[-1]
    value = F.pad(value, (0, key.shape[-1] - width))
    if visible is None:
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return output[..., :width]
    kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    sees_any = visible.any(dim=-1, keepdim=True)
    mask = (visible | ~sees_any).repeat(1, 1, groups, 1)
    rows = query.unflatten(1, (kv_heads, groups)).flatten(2, 3)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    output = output.unflatten(2, (groups, query.shape[2])).flatten(1, 2)
    return output[..., :width] * sees_any


def key_segments(length: int) -> list[tuple[int, int, int]]:
    """(start, stop, repeated) of equal power-of-two pieces of `length` keys; the last piece reaches back over
    `repeated` keys of the one before it.

    A cache grows by one key per token. One product over all keys would be a new matrix shape each time, and the CPU
    library compiles and keeps a kernel per shape (2 ms and 0.5 MB).
    """
    size = min(1 << (length.bit_length() - 1), LONGEST_SEGMENT)
    pieces = [(start, start + size, 0) for start in range(0, length - size + 1, size)]
    if length % size:
        pieces.append((length - size, length, size - length % size))
    return pieces


def decode_attention(query, key, value, key_mask, window, scaling, sinks) -> torch.Tensor:
    """One query per sequence, or as many as are drafted: [B, heads, queries, D] -> [B, heads, queries, Dv]. The heads
    of a KV group form one small matrix, so keys and values are read once and never expanded.

    On a CPU there is one product per KV head and segment of keys: a batched product copies keys and values, which are
    views of a cache with room to grow; for few keys the copy is cheaper than more calls. A `key_mask` of four dims, as
    a static cache brings, comes with causality and window, and with keys that are whole tensors.
    """
    (batch, heads, queries, dim), (kv_heads, keys) = query.shape, key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, dim)
    explicit = key_mask is not None and key_mask.dim() == 4
    in_pieces = query.device.type == "cpu" and keys > FEW_KEYS and not explicit
    if in_pieces:
        pieces = list(itertools.product(range(batch), range(kv_heads), key_segments(keys)))
        scores = torch.empty(*grouped.shape[:3], keys)
        for row, head, (start, stop, _) in pieces:
            scores[row, head, :, start:stop] = grouped[row, head] @ key[row, head, start:stop].T
    else:
        scores = (grouped @ key.transpose(-1, -2)).float()
    scores = (scores * scaling).view(batch, heads, queries, keys)
    if explicit:
        scores = scores.masked_fill(~key_mask, -math.inf)
    # a single query sees every key that its caller left
    elif queries > 1 or key_mask is not None:
        window = None if queries == 1 else window
        scores = scores.masked_fill(~causal_mask(key_mask, queries, keys, window, query.device), -math.inf)
    weights = softmax_with_sinks(scores, sinks).view(*grouped.shape[:3], keys).to(value.dtype)
    if in_pieces:
        output = torch.zeros(*grouped.shape[:3], value.shape[-1])
        for row, head, (start, stop, repeated) in pieces:
            piece = weights[row, head, :, start:stop]
            piece = F.pad(piece[:, repeated:], (repeated, 0)) if repeated else piece
            output[row, head] += piece @ value[row, head, start:stop]
    else:
        output = weights @ value
    return output.to(value.dtype).view(batch, heads, queries, -1)


def matmul_is_faster(query: torch.Tensor) -> bool:
    """PyTorch's CPU matrix products run at three times the rate of its flash kernel in bfloat16, and in nothing else.

    They round scores to bfloat16. The two functions below therefore subtract an estimate of each row's largest score
    inside the product, by one more column of queries and keys: what decides the softmax is then close to zero and
    rounded finely (tests/test_attention.py compares the error with both other ways).
    """
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and not torch.is_grad_enabled()


def global_attention(query, key, value, key_mask, scaling, sinks) -> torch.Tensor:
    """Causal attention over all keys, [B, heads, queries, Dv]; a mask exists for one block of queries at a time."""
    queries, keys = query.shape[2], key.shape[2]
    if matmul_is_faster(query) and key_mask is None and sinks is None:
        return global_attention_by_matmul(query, key, value, scaling)
    if key_mask is None and queries == keys:
        return attend(query, key, value, None, True, scaling, sinks)
    outputs = []
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        end = keys - queries + stop
        block_mask = None if key_mask is None else key_mask[:, :end]
        visible = causal_mask(block_mask, stop - start, end, None, query.device)
        block = attend(query[:, :, start:stop], key[:, :, :end], value[:, :, :end], visible, False, scaling, sinks)
        outputs.append(block)
    return torch.cat(outputs, dim=2)


def global_attention_by_matmul(query, key, value, scaling) -> torch.Tensor:
    """`global_attention` where `matmul_is_faster`, [B, heads, queries, Dv]. The estimate of a row's largest score
    looks at the keys of its own block and at the first keys; score blocks reuse the same two buffers."""
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    groups, prefix = heads // kv_heads, keys - queries
    step = max(SCORE_ROWS // groups, 1)
    buffers = torch.empty(2, min(step, queries) * groups * keys, dtype=query.dtype)
    future = torch.ones(step, step, dtype=torch.bool).triu_(1)
    # heads beside one another, as the output projection reads them
    output = torch.empty(batch, queries, heads, value.shape[-1], dtype=query.dtype).transpose(1, 2)
    for row, head in itertools.product(range(batch), range(kv_heads)):
        group = slice(head * groups, (head + 1) * groups)
        wide_key = F.pad(key[row, head], (0, MORE_COLUMNS))
        wide_key[:, -1] = 1
        for start in range(0, queries, step):
            stop = min(start + step, queries)
            size, end = stop - start, prefix + stop
            block = (query[row, group, start:stop] * scaling).flatten(0, 1)
            hidden = future[:size, :size]
            near = block @ key[row, head, end - size : end].T
            near = near.view(groups, size, size).masked_fill_(hidden, -math.inf).amax(-1).flatten()
            top = torch.maximum(near, (block @ key[row, head, : min(SAMPLED_KEYS, end - size + 1)].T).amax(-1))
            wide_block = F.pad(block, (0, MORE_COLUMNS))
            wide_block[:, -1] = -top
            scores, weights = (buffer[: len(block) * end].view(len(block), end) for buffer in buffers)
            torch.mm(wide_block, wide_key[:end].T, out=scores)
            scores.view(groups, size, end)[..., end - size :].masked_fill_(hidden, -math.inf)
            torch.softmax(scores, dim=-1, out=weights)
            output[row, group, start:stop] = (weights @ value[row, head, :end]).view(groups, size, -1)
    return output


def sliding_block_by_matmul(query, key, value, visible, is_causal, scaling, sinks) -> torch.Tensor:
    """`attend` for blocks of a sliding layer where `matmul_is_faster`; a query's own key, at the end of the block's
    keys, and its sink estimate its largest score. One more key of value zero stands for the sink."""
    (blocks, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    groups = heads // kv_heads
    rows = (query * scaling).unflatten(1, (kv_heads, groups))
    top = (rows * key[:, :, None, keys - queries :]).sum(dim=-1)
    if sinks is None:
        # takes all of a query that sees no key, and nothing of the others
        sink = top.new_full((), torch.finfo(top.dtype).min)
    else:
        sink = sinks.to(top.dtype).view(kv_heads, groups, 1)
        top = torch.maximum(top, sink)
        sink = sink - top
    rows = F.pad(rows, (0, MORE_COLUMNS))
    rows[..., -1] = -top
    key, value = F.pad(key, (0, MORE_COLUMNS, 0, 1)), F.pad(value, (0, 0, 0, 1))
    key[..., -1] = 1
    scores = rows.flatten(2, 3).flatten(0, 1) @ key.flatten(0, 1).transpose(1, 2)
    split = scores.view(blocks, kv_heads, groups, queries, keys + 1)
    split[..., :-1].masked_fill_(~visible[:, :, None], -math.inf)
    split[..., -1] = sink
    return (scores.softmax(dim=-1) @ value.flatten(0, 1)).view(blocks, heads, queries, -1)


def sliding_attention(query, key, value, key_mask, window, scaling, sinks) -> torch.Tensor:
    """Causal attention over the last `window` keys, [B, heads, queries, Dv], in time and memory linear in the length.

    Queries are cut into blocks of `window`; a block sees its own keys and the `window - 1` before it. The blocks of
    one step, of several sequences if they are short, form the batch of one kernel call; those of a single sequence
    are overlapping strided views.
    """
    batch, heads, queries, _ = query.shape
    prefix, span = key.shape[2] - queries, 2 * window - 1
    step = max(QUERY_BLOCK // window, 1) * window
    kernel = sliding_block_by_matmul if matmul_is_faster(query) else attend
    if key_mask is None:
        key_mask = torch.ones(1, key.shape[2], dtype=torch.bool, device=query.device)
    key_mask = key_mask.expand(batch, -1)
    row = torch.arange(window, device=query.device)[:, None]
    offsets = torch.arange(span, device=query.device)[None, :]
    band = (offsets >= row) & (offsets < row + window)
    outputs = []
    # split, not sliced: the gradient of a slice is as large as the whole batch
    groups = zip(*(part.split(max(step // queries, 1)) for part in (query, key, value, key_mask)))
    for (query, key, value, key_mask), start in itertools.product(groups, range(0, queries, step)):
        stop = min(start + step, queries)
        blocks = -(-(stop - start) // window)
        first = prefix + start - (window - 1)
        # missing keys before the first token and missing queries after the last one
        front, tail = max(-first, 0), blocks * window - (stop - start)
        seen = slice(max(first, 0), prefix + stop)
        block_query = F.pad(query[:, :, start:stop], (0, 0, 0, tail)).unflatten(2, (blocks, window)).transpose(1, 2)
        block_key = F.pad(key[:, :, seen], (0, 0, front, tail)).unfold(2, span, window).permute(0, 2, 1, 4, 3)
        block_value = F.pad(value[:, :, seen], (0, 0, front, tail)).unfold(2, span, window).permute(0, 2, 1, 4, 3)
        visible = band & F.pad(key_mask[:, seen], (front, tail)).unfold(1, span, window)[:, :, None, :]
        parts = (part.flatten(0, 1) for part in (block_query, block_key, block_value, visible[:, :, None]))
        output = kernel(*parts, False, scaling, sinks).unflatten(0, (-1, blocks))
        outputs.append(output.transpose(2, 3).flatten(1, 2)[:, : stop - start].flatten(0, 1))
    return torch.cat(outputs).view(batch, queries, heads, -1).transpose(1, 2)


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scaling: float,
    sinks: torch.Tensor | None = None,
    first_key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over `window` keys on either side, in time and memory linear in the length.

    Queries are cut into blocks of `window`; a block sees its own keys and `window` more before and behind. As in
    `sliding_attention` the blocks are overlapping strided views; only a batch of several sequences copies them.

    Args:
        query: [B, heads, S, D]. key, value: [B, kv heads, S, D].
        sinks: one more logit per head that takes probability and gives no value, [heads].
        first_key_bias: added to the logit of the first key of each sequence, [heads].

    Returns:
        [B, S, heads, D].
    """
    (batch, heads, length, _), device = query.shape, query.device
    size = min(window, length)
    blocks, span = -(-length // size), size + 2 * window
    # queries that the last block lacks
    tail = blocks * size - length
    query = F.pad(query, (0, 0, 0, tail)).unflatten(2, (blocks, size)).transpose(1, 2)
    key = F.pad(key, (0, 0, window, window + tail)).unfold(2, span, size).permute(0, 2, 1, 4, 3)
    value = F.pad(value, (0, 0, window, window + tail)).unfold(2, span, size).permute(0, 2, 1, 4, 3)
    row, column = torch.arange(size, device=device)[:, None], torch.arange(span, device=device)
    place = torch.arange(0, blocks * size, size, device=device)[:, None] + column - window
    visible = ((column >= row) & (column <= row + 2 * window)) & ((place >= 0) & (place < length))[:, None]
    # blocks that see the first key; they carry its bias as one more column of queries and keys
    near = 0 if first_key_bias is None else min(window // size + 1, blocks)
    outputs = []
    for part in (slice(0, near), slice(near, blocks)):
        if part.start == part.stop:
            continue
        seen = visible[part, None].repeat(batch, 1, 1, 1)
        block_query, block_key, block_value = (states[:, part].flatten(0, 1) for states in (query, key, value))
        if part.start < near:
            bias = (first_key_bias / scaling).to(query.dtype).view(1, heads, 1, 1).expand(*block_query.shape[:3], 1)
            is_first = (place[part] == 0).repeat(batch, 1)[:, None, :, None].expand(*block_key.shape[:3], 1)
            block_query = F.pad(torch.cat((block_query, bias), dim=-1), (0, MORE_COLUMNS - 1))
            block_key = F.pad(torch.cat((block_key, is_first.to(key.dtype)), dim=-1), (0, MORE_COLUMNS - 1))
        output = attend(block_query, block_key, block_value, seen, False, scaling, sinks)
        outputs.append(output.transpose(1, 2).unflatten(0, (batch, -1)))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output.flatten(1, 2)[:, :length]


def sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same contract and numbers as `eager_attention_forward`, without weights and without a queries x keys matrix.

    Many queries with an explicit 4-D mask, and attention dropout, take the eager path: right, quadratic in memory.
    """
    explicit_mask = attention_mask is not None and attention_mask.dim() == 4
    if explicit_mask and query.shape[2] <= FEW_QUERIES and dropout == 0:
        output = decode_attention(query, key, value, bool_mask(attention_mask), sliding_window, scaling, s_aux)
        return output.transpose(1, 2), None
    if explicit_mask or (dropout > 0 and module.training):
        return eager_attention_forward(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, s_aux
        )
    key_mask = None if attention_mask is None else attention_mask.bool()
    queries, keys = query.shape[2], key.shape[2]
    # elsewhere than on a CPU the fused kernel for global layers takes several queries as well
    few = queries == 1 or (queries <= FEW_QUERIES and (sliding_window is not None or query.device.type == "cpu"))
    if few and sliding_window is not None and keys > (seen := sliding_window + queries - 1):
        key, value = key[:, :, -seen:], value[:, :, -seen:]
        key_mask = None if key_mask is None else key_mask[:, -seen:]
    if few:
        output = decode_attention(query, key, value, key_mask, sliding_window, scaling, s_aux)
    elif sliding_window is None or keys <= sliding_window:
        output = global_attention(query, key, value, key_mask, scaling, s_aux)
    else:
        output = sliding_attention(query, key, value, key_mask, sliding_window, scaling, s_aux)
    return output.transpose(1, 2), None


__all__ = ["MiMoV2MLP", "MiMoV2RMSNorm"]
