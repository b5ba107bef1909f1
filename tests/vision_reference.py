"""MiMo-V2's vision tower on one page: the naive fp32 ground truth for the tests.

One patch, one query, one head at a time where that is what the definition says: Python loops over media, frames,
blocks and the window of every query. `config` is a plain dict in the spelling of the released `vision_config` and
weights carry their released names without `visual.`. The page shares no code with the package it checks.
"""

import math

import torch


FULL, ROW, COLUMN = -1, 0, 1


def vision_tower(
    pixels: torch.Tensor, grid: list[list[int]], config: dict, weights: dict[str, torch.Tensor]
) -> torch.Tensor:
    """pixels [patches, C * T * P * P] and grid [[t, h, w], ...] -> features [patches / 4, out_hidden_size]."""
    features, start = [], 0
    for frames, height, width in grid:
        for _ in range(frames):
            stop = start + height * width
            features.append(frame_features(pixels[start:stop], height, width, config, weights))
            start = stop
    return torch.cat(features)


def patch_coordinates(height: int, width: int, merge: int) -> list[tuple[int, int]]:
    """(row, column) of each patch in the order of the processor: merge units in reading order, inside them too."""
    return [
        (top + i, left + j)
        for top in range(0, height, merge)
        for left in range(0, width, merge)
        for i in range(merge)
        for j in range(merge)
    ]


def column_order(height: int, width: int, merge: int) -> list[int]:
    """The places of the patches when whole merge units are read column by column."""
    coordinates = patch_coordinates(height, width, merge)
    return sorted(
        range(len(coordinates)), key=lambda n: (coordinates[n][1] // merge, coordinates[n][0] // merge, n % merge**2)
    )


def frame_features(pixels, height, width, config, weights):
    """One frame (two pictures of a video, or one image): nothing outside it matters."""
    merge = config["spatial_merge_size"]
    x = torch.stack([weights["patch_embed.proj.weight"].flatten(1) @ patch for patch in pixels])
    coordinates = patch_coordinates(height, width, merge)
    for index, kind in enumerate(config["vit_window_attn_types"]):
        # in and out of the block's order: the same as staying in it from one block to the next
        order = column_order(height, width, merge) if kind == COLUMN else list(range(len(x)))
        part = {
            name.removeprefix(f"blocks.{index}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"blocks.{index}.")
        }
        y = block(x[order], [coordinates[place] for place in order], kind, config, part)
        x = torch.empty_like(y)
        x[order] = y
    x = layer_norm(x, weights["merger.ln_q.weight"])
    units = torch.stack([torch.cat(list(unit)) for unit in x.split(merge**2)])
    units = units @ weights["merger.mlp.0.weight"].T
    units = units * 0.5 * (1 + torch.erf(units / math.sqrt(2)))
    return units @ weights["merger.mlp.2.weight"].T


def block(x, coordinates, kind, config, weights):
    x = x + attention(rms_norm(x, weights["norm1.weight"]), coordinates, kind, config, weights)
    y = rms_norm(x, weights["norm2.weight"])
    gate = y @ weights["mlp.gate_proj.weight"].T + weights["mlp.gate_proj.bias"]
    up = y @ weights["mlp.up_proj.weight"].T + weights["mlp.up_proj.bias"]
    return x + (gate * torch.sigmoid(gate) * up) @ weights["mlp.down_proj.weight"].T + weights["mlp.down_proj.bias"]


def attention(x, coordinates, kind, config, weights):
    heads, kv_heads, dim = config["num_heads"], config["num_key_value_heads"], config.get("head_dim", 64)
    qkv = x @ weights["attn.qkv.weight"].T + weights["attn.qkv.bias"]
    query, key, value = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    query, key, value = (part.view(len(x), -1, dim) for part in (query, key, value))
    query = torch.stack([rotate(states, *place) for states, place in zip(query, coordinates)])
    key = torch.stack([rotate(states, *place) for states, place in zip(key, coordinates)])
    key, value = (part[:, [head * kv_heads // heads for head in range(heads)]] for part in (key, value))
    sinks, sink_type = weights.get("attn.sinks"), config.get("sink_type", "first_key")
    window = len(x) if kind == FULL else config["visual_token_window_size"]
    rows = []
    for i in range(len(x)):
        first, last = max(0, i - window), min(len(x) - 1, i + window)
        logits = (query[i] * key[first : last + 1]).sum(-1).T / math.sqrt(dim)
        if sinks is not None and sink_type == "first_key" and first == 0:
            logits = torch.cat([logits[:, :1] + sinks[:, None], logits[:, 1:]], dim=1)
        if sinks is not None and sink_type == "null_logit":
            logits = torch.cat([logits, sinks[:, None]], dim=1)
        shares = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
        shares = shares / shares.sum(dim=1, keepdim=True)
        seen = value[first : last + 1]
        rows.append(sum(shares[:, n, None] * seen[n] for n in range(len(seen))).flatten())
    return torch.stack(rows) @ weights["attn.proj.weight"].T + weights["attn.proj.bias"]


def rotate(states, row, column):
    """[heads, D]: dim d turns with dim d + D/2; the first half of the pairs by the row, the rest by the column."""
    dim = states.shape[-1]
    quarter = dim // 4
    speeds = [10000.0 ** (-n / quarter) for n in range(quarter)]
    angle = torch.tensor(
        [row * speed for speed in speeds] + [column * speed for speed in speeds], device=states.device
    )
    first, second = states[:, : dim // 2], states[:, dim // 2 :]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def rms_norm(x, weight):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


def layer_norm(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * weight
