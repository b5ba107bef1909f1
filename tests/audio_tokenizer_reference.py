"""The audio tokenizer as one naive page in float32: one segment at a time, explicit masks, an explicit residual loop.

Written from the description of the released files; shares no code with the package.
"""

import torch
import torch.nn.functional as F


def codes(tensors: dict[str, torch.Tensor], config, mel: torch.Tensor) -> list[list[int]]:
    """Released tensors, a config and the mel frames [frames, bins] of one segment -> codes, [code frames][levels]."""
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    hidden = features(weights, config, mel.float())
    frames = []
    for row in hidden:
        residual, frame = row, []
        for level in range(config.num_quantizers):
            entries = weights[f"encoder.quantizer.vq.layers.{level}._codebook.embed"]
            if config.reference_dtype == "bfloat16":
                entries = entries.bfloat16().float()
            nearest = int(((residual - entries).double() ** 2).sum(1).argmin())
            frame.append(nearest)
            residual = residual - entries[nearest]
        frames.append(frame)
    return frames


def features(weights: dict[str, torch.Tensor], config, mel: torch.Tensor) -> torch.Tensor:
    """What is quantized, [code frames, hidden]."""

    def get(name):
        return weights[f"encoder.{name}.weight"], weights.get(f"encoder.{name}.bias")

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], *get(name), eps=1e-5)

    x = F.gelu(F.conv1d(mel.T[None], *get("conv1"), padding=1))
    x = F.gelu(F.conv1d(x, *get("conv2"), stride=2, padding=1))[0].T
    length, heads = len(x), config.num_attention_heads
    dim = x.shape[1] // heads
    frequencies = torch.tensor([1 / config.rope_theta ** (2 * i / dim) for i in range(dim // 2)])
    if config.reference_dtype == "bfloat16":
        frequencies = frequencies.bfloat16().float()
    angles = torch.arange(length)[:, None].float() * frequencies
    cos, sin = (torch.cat([table, table], -1)[:, None] for table in (angles.cos(), angles.sin()))
    kept = 0
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        h = norm(x, f"{layer}.self_attn_layer_norm")
        query, key, value = (
            F.linear(h, *get(f"{layer}.self_attn.{letter}_proj")).view(length, heads, dim) for letter in "qkv"
        )
        query, key = (
            states * cos + torch.cat([-states[..., dim // 2 :], states[..., : dim // 2]], -1) * sin
            for states in (query, key)
        )
        mask = torch.zeros(length, length)
        for i in range(length):
            for j in range(length):
                # even layers look back over a window, odd ones over everything, and none ahead
                if j > i or (index % 2 == 0 and j < i - config.sliding_window):
                    mask[i, j] = -torch.inf
        scores = torch.einsum("ihd,jhd->hij", query, key) / dim**0.5 + mask
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value).reshape(length, -1)
        x = x + F.linear(mixed, *get(f"{layer}.self_attn.out_proj"))
        h = F.gelu(F.linear(norm(x, f"{layer}.final_layer_norm"), *get(f"{layer}.fc1")))
        x = x + F.linear(h, *get(f"{layer}.fc2"))
        if index == config.skip_layer_id - 1:
            kept = x
    x = norm(x + kept, "layer_norm")
    if length % 2:
        x = torch.cat([x, torch.zeros(1, x.shape[1])])
    x = F.gelu(F.conv1d(x.T[None], get("down_sample_layer.0")[0], stride=2))[0].T
    return norm(x, "down_sample_norm")
