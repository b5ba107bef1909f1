"""MiMo-V2 text model on one page: the naive fp32 ground truth for the tests.

No cache, no fused kernels, n x n masks written out. `config` is a plain dict in the spelling of the released
config.json and weights carry their names on disk. The page shares no code with the package it checks.
"""

import torch


BLOCK = (128, 128)  # fp8 weights have one fp32 scale per 128 x 128 block
ROUTER_NAMES = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")


# Weights ---------------------------------------------------------------------------------------------------------


def dequantize(weight_fp8, scale, chunks=1, block=BLOCK):
    """w.to(f32) * scale[row // 128, col // 128]; the block grid restarts at each of `chunks` equal row chunks."""
    rows, cols = weight_fp8.shape[0] // chunks, weight_fp8.shape[1]
    scale_rows = -(-rows // block[0])  # rounded up: the last block of a chunk may be partial (3392 rows -> 27)
    expected = (chunks * scale_rows, -(-cols // block[1]))
    if weight_fp8.shape[0] % chunks or tuple(scale.shape) != expected:
        raise ValueError(f"{tuple(weight_fp8.shape)} in {chunks} chunks needs scales {expected}, got {scale.shape}")
    column_block = torch.arange(cols, device=scale.device) // block[1]
    row_block = torch.arange(rows, device=scale.device) // block[0]
    parts = []
    for c in range(chunks):
        w = weight_fp8[c * rows : (c + 1) * rows].to(torch.float32)
        parts.append(w * scale.to(torch.float32)[c * scale_rows + row_block][:, column_block])
    return torch.cat(parts)


def dequantize_mxfp4(packed, scale):
    """Two e2m1 codes per byte, the low nibble first, times 2 ** (scale - 127) for each 32 columns; 255 is NaN."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2)
    factor = torch.where(scale == 255, torch.nan, torch.exp2(scale.float() - 127))
    return values[codes.long()] * factor.repeat_interleave(32, dim=-1)


def split_qkv(weight, config, swa, qkv_layout="chunked"):
    """Fused rows -> (q, k, v). Chunk c is [Q heads of c | K heads of c | V heads of c]; "plain" is one chunk."""
    chunks = config["num_key_value_heads"] if qkv_layout == "chunked" else 1  # the global count, on SWA layers too
    heads, kv_heads, head_dim, v_head_dim = attention_shape(config, swa)
    if heads % chunks or kv_heads % chunks:
        raise ValueError(f"{heads} query heads and {kv_heads} kv heads do not divide into {chunks} chunks")
    sizes = [heads // chunks * head_dim, kv_heads // chunks * head_dim, kv_heads // chunks * v_head_dim]
    parts = [chunk.split(sizes) for chunk in weight.split(sum(sizes))]
    if len(parts) != chunks:
        raise ValueError(f"fused qkv has {weight.shape[0]} rows, expected {chunks} chunks of {sum(sizes)}")
    return tuple(torch.cat([part[i] for part in parts]) for i in range(3))


def reference_weights(tensors, config, through=None, qkv_layout="chunked"):
    """Released state dict -> fp32 weights under the same names, scales consumed.

    A fused qkv_proj keeps its rows as on disk and q_proj / k_proj / v_proj are added next to it; those are what
    the forward pass reads. `through` (e.g. torch.bfloat16) rounds as a model of that dtype would hold the weights,
    except the router tensors, which stay as stored (F32 in V2.5, BF16 in V2.6).
    """
    if qkv_layout not in ("chunked", "plain"):
        raise ValueError(qkv_layout)
    block = (config.get("quantization_config") or {}).get("weight_block_size", BLOCK)
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            if name.removesuffix("_scale_inv") not in tensors:
                raise KeyError(f"scale without a weight: {name}")
            continue
        if name.endswith("_scale"):
            continue
        if tensor.dtype == torch.uint8:  # the experts of V2.6
            out[name] = dequantize_mxfp4(tensor, tensors[name + "_scale"])
            if through is not None:
                out[name] = out[name].to(through).to(torch.float32)
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {tensor.dtype} is not handled here")
        fused = name.endswith("self_attn.qkv_proj.weight")
        if tensor.element_size() == 1:
            chunks = config["num_key_value_heads"] if fused and qkv_layout == "chunked" else 1
            tensor = dequantize(tensor, tensors[name + "_scale_inv"], chunks, block)
        if through is not None and not name.endswith(ROUTER_NAMES):
            tensor = tensor.to(through)
        out[name] = tensor.to(torch.float32)
        if fused:
            mtp = ".mtp." in name  # every MTP block is a sliding one
            swa = mtp or bool(config["hybrid_layer_pattern"][int(name.split("layers.")[1].split(".")[0])])
            for letter, part in zip("qkv", split_qkv(out[name], config, swa, qkv_layout)):
                out[name.replace("qkv_proj", f"{letter}_proj")] = part
    return out


# Forward ---------------------------------------------------------------------------------------------------------


def attention_shape(config, swa):
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim")
    return tuple(config.get(f"swa_{key}", config[key]) if swa else config[key] for key in keys)


def rms_norm(x, weight, config):
    return weight.to(x.dtype) * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"])


def linear(x, weight):
    return x @ weight.to(x.dtype).T


def rotary(x, positions, theta, factor):
    """x [B,S,heads,head_dim]: the first int(head_dim * factor) dims turn (192 * 0.334 -> 64), halves paired."""
    dim = int(x.shape[-1] * factor)
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, device=x.device).to(x.dtype) / dim)
    angle = positions[:, :, None, None].to(x.dtype) * inv_freq
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attention_mask_matrix(real, window=None):
    """[B,S] of real tokens -> [B,S,S], True where query i may see key j. `window` counts the query itself."""
    i = torch.arange(real.shape[1], device=real.device)[:, None]
    j = torch.arange(real.shape[1], device=real.device)[None, :]
    allowed = j <= i
    if window is not None:
        allowed = allowed & (i - j < window)
    return allowed[None] & real[:, None, :]


def attention(x, weights, prefix, config, swa, positions, allowed):
    heads, kv_heads, head_dim, v_head_dim = attention_shape(config, swa)
    b, s, _ = x.shape
    theta = config["swa_rope_theta" if swa else "rope_theta"]
    if "partial_rotary_factor" in config:
        factor = config["partial_rotary_factor"]
    else:
        factor = config["rope_parameters"]["partial_rotary_factor"]
    if prefix + "q_proj.weight" in weights:
        wq, wk, wv = (weights[f"{prefix}{letter}_proj.weight"] for letter in "qkv")
    else:
        wq, wk, wv = split_qkv(weights[prefix + "qkv_proj.weight"], config, swa)
    q = rotary(linear(x, wq).view(b, s, heads, head_dim), positions, theta, factor)
    k = rotary(linear(x, wk).view(b, s, kv_heads, head_dim), positions, theta, factor)
    value_scale = config["attention_value_scale"]  # a missing key must fail: 1.0 would be quietly worse
    v = linear(x, wv).view(b, s, kv_heads, v_head_dim) * (1.0 if value_scale is None else value_scale)

    has_sink = config["add_swa_attention_sink_bias" if swa else "add_full_attention_sink_bias"]
    outputs = []
    for h in range(heads):
        g = h // (heads // kv_heads)  # grouped queries: consecutive query heads share a kv head
        scores = q[:, :, h] @ k[:, :, g].transpose(1, 2) * head_dim**-0.5
        scores = scores.masked_fill(~allowed, float("-inf"))
        sink = x.new_full((), float("-inf"))  # exp(-inf) = 0: no share of the softmax
        if has_sink:
            sink = weights[prefix + "attention_sink_bias"][h].to(x.dtype)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink)
        top = top.masked_fill(top.isinf(), 0.0)  # nothing to attend and no sink: avoid inf - inf
        exp = (scores - top).exp()
        total = exp.sum(-1, keepdim=True) + (sink - top).exp()  # the sink takes its share and gives no value
        probs = exp / total.masked_fill(total == 0, 1.0)  # nothing to attend: zero output, not 0 / 0
        outputs.append(probs @ v[:, :, g])
    return linear(torch.cat(outputs, dim=-1), weights[prefix + "o_proj.weight"])


def mlp(x, weights, prefix):
    gate, up, down = (weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)


def route(x, weights, prefix, config):
    """x [T,H] -> [T,E] expert weights, zero where an expert was not chosen."""
    gate = weights[prefix + "gate.weight"]
    if config.get("moe_router_dtype") == "bfloat16":
        # bf16 operands, fp32 (or fp64) sum: the logits themselves are not rounded
        logits = linear(x.to(torch.bfloat16).to(x.dtype), gate.to(torch.bfloat16))
    else:
        logits = linear(x, gate)
    scores = logits.sigmoid()
    chosen_by = scores + weights[prefix + "gate.e_score_correction_bias"].to(x.dtype)  # for the selection only
    experts, groups = config["n_routed_experts"], config.get("n_group") or 1
    topk_group = config.get("topk_group") or 1
    scale = config.get("routed_scaling_factor")
    scale = 1.0 if scale is None else scale
    size = experts // groups
    result = torch.zeros_like(scores)
    for t in range(x.shape[0]):
        rank = torch.full_like(chosen_by[t], float("-inf"))
        by_group = chosen_by[t].view(groups, size)
        best_two = by_group.topk(min(2, size), dim=-1).values.sum(-1)  # a group is worth its two best experts
        for group in best_two.topk(topk_group).indices.tolist():
            rank[group * size : (group + 1) * size] = by_group[group]
        picked = rank.topk(config["num_experts_per_tok"]).indices
        picked_scores = scores[t, picked]  # without the bias
        if config["norm_topk_prob"]:
            picked_scores = picked_scores / (picked_scores.sum() + 1e-20)
        result[t, picked] = picked_scores * scale
    return result


def moe(x, weights, prefix, config):
    tokens = x.reshape(-1, x.shape[-1])
    share = route(tokens, weights, prefix, config)
    out = torch.zeros_like(tokens)
    for e in range(config["n_routed_experts"]):
        mine = share[:, e].nonzero()[:, 0]
        if len(mine):
            out[mine] += share[mine, e, None] * mlp(tokens[mine], weights, f"{prefix}experts.{e}.")
    return out.view_as(x)


def check_supported(config):
    wanted = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}={config[key]} is not on this page")
    if config.get("attention_bias") or config.get("n_shared_experts"):
        raise ValueError("attention biases and shared experts are not on this page: no released model has them")


def reference_hidden(
    weights,
    config,
    input_ids=None,
    attention_mask=None,
    window=None,
    position_ids=None,
    inputs_embeds=None,
    dtype=torch.float32,
):
    """[B,S,H] after the last layer and before the final norm (what the MTP heads take)."""
    check_supported(config)
    x = weights["model.embed_tokens.weight"][input_ids] if inputs_embeds is None else inputs_embeds
    x = x.to(dtype)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if attention_mask is not None:
        real = attention_mask.to(x.device).bool()
    if position_ids is None:
        position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)  # padding on the left does not shift positions
    positions = position_ids.to(x.device).expand(x.shape[:2])
    full = attention_mask_matrix(real)
    sliding = attention_mask_matrix(real, config["sliding_window"] if window is None else window)

    for n in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{n}."
        swa = bool(config["hybrid_layer_pattern"][n])
        y = rms_norm(x, weights[prefix + "input_layernorm.weight"], config)
        x = x + attention(y, weights, prefix + "self_attn.", config, swa, positions, sliding if swa else full)
        y = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], config)
        if config["moe_layer_freq"][n]:
            x = x + moe(y, weights, prefix + "mlp.", config)
        else:
            x = x + mlp(y, weights, prefix + "mlp.")
    return x


def reference_logits(weights, config, input_ids=None, *args, **kwargs):
    """[B,S,V]; same arguments as reference_hidden."""
    hidden = reference_hidden(weights, config, input_ids, *args, **kwargs)
    tied = config.get("tie_word_embeddings", False)
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return linear(rms_norm(hidden, weights["model.norm.weight"], config), head)
