"""MiMo-V2's audio encoder on one page: the naive fp32 ground truth for the tests.

One frame, one channel, one head, one query at a time. `config` is a plain dict in the spelling of the released
`audio_config`, and weights carry their released names. The page shares no code with the package it checks.
"""

import math

import torch


EPS = 1e-6


def audio_features(codes: list[torch.Tensor], config: dict, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """codes: one [frames, channels] per audio -> one [groups, out_hidden_size] per audio."""
    features = []
    for audio in codes:
        frames = [frame_embedding(frame, config, weights) for frame in audio]
        # the last frame again until the last group is full
        while len(frames) % config["group_size"]:
            frames.append(frames[-1])
        groups = [frames[i : i + config["group_size"]] for i in range(0, len(frames), config["group_size"])]
        features.append(torch.stack([group_feature(torch.stack(group), config, weights) for group in groups]))
    return features


def frame_embedding(frame, config, weights):
    total = 0
    for channel in range(config["audio_channels"]):
        total = total + weights[f"speech_embeddings.{channel}.weight"][frame[channel]]
    return total


def group_feature(states, config, weights):
    """states [frames, dim] of one group, which sees nothing else -> [out_hidden_size]."""
    transformer = "audio_encoder.input_local_transformer"
    for index in range(config["input_local_layers"]):
        layer = f"{transformer}.layers.{index}"
        normed = rms_norm(states, weights[f"{layer}.input_layernorm.weight"])
        states = states + attention(normed, f"{layer}.self_attn", config, weights)
        normed = rms_norm(states, weights[f"{layer}.post_attention_layernorm.weight"])
        gate, up = (normed @ weights[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        states = states + (gate * torch.sigmoid(gate) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    if config["add_post_norm"]:
        states = rms_norm(states, weights[f"{transformer}.norm.weight"])
    side_by_side = torch.cat(list(states))
    if config["projection_layers"] == 1:
        return weights["audio_encoder.projection.weight"] @ side_by_side
    inner = weights["audio_encoder.projection.mlp.0.weight"] @ side_by_side
    inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
    return weights["audio_encoder.projection.mlp.2.weight"] @ inner


def rms_norm(states, weight):
    return weight * states / torch.sqrt((states**2).mean(-1, keepdim=True) + EPS)


def attention(states, name, config, weights):
    heads, head_dim = config["input_local_attn_heads"], config["input_local_head_dim"]
    query, key, value = (
        (states @ weights[f"{name}.{letter}_proj.weight"].T + weights[f"{name}.{letter}_proj.bias"]).view(
            -1, heads, head_dim
        )
        for letter in "qkv"
    )
    rows = []
    for i in range(len(states)):
        seen = range(len(states)) if config["input_full_attention"] else range(i + 1)
        row = []
        for head in range(heads):
            turned = rotate(query[i, head], i, config)
            logits = torch.stack([turned @ rotate(key[j, head], j, config) for j in seen]) / math.sqrt(head_dim)
            shares = torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()
            row.append(sum(share * value[j, head] for share, j in zip(shares, seen)))
        rows.append(torch.cat(row))
    return torch.stack(rows) @ weights[f"{name}.o_proj.weight"].T


def rotate(vector, position, config):
    """Dim d of the first half of the rotated ones turns together with dim d of their second half."""
    rotary = int(len(vector) * config["partial_rotary_factor"])
    turned = list(vector)
    for d in range(rotary // 2):
        angle = position * config["rope_theta"] ** (-2 * d / rotary)
        first, second = vector[d], vector[d + rotary // 2]
        turned[d] = first * math.cos(angle) - second * math.sin(angle)
        turned[d + rotary // 2] = second * math.cos(angle) + first * math.sin(angle)
    return torch.stack(turned)
