"""MiMo-V2's MTP heads on one page: the naive fp32 ground truth for the tests. Shares no code with the package.

Head k sits at position i with the trunk's hidden state of position i, before the final norm, and the embedding of
token i + 1 + k; it predicts token i + 2 + k. It attends to its own inputs at positions <= i within the window.
"""

import torch
from reference import attention, attention_mask_matrix, linear, mlp, rms_norm


def draft_inputs(weights, config, tokens, hidden, head):
    """[n,H] inputs of the head at positions 0 ... n - 1; the last is the one whose token is the last of `tokens`."""
    prefix = f"model.mtp.layers.{head}."
    rows = []
    for i in range(min(len(hidden), len(tokens) - 1 - head)):
        embedding = weights["model.embed_tokens.weight"][tokens[i + 1 + head]]
        embedding = rms_norm(embedding, weights[prefix + "enorm.weight"], config)
        state = rms_norm(hidden[i], weights[prefix + "hnorm.weight"], config)
        rows.append(linear(torch.cat([embedding, state]), weights[prefix + "eh_proj.weight"]))  # embedding first
    return torch.stack(rows)


def draft_logits(weights, config, tokens, hidden, head, first_position=0):
    """[n,V] of one head at every position i whose token i + 1 + head is known.

    `tokens` [T] and `hidden` [S,H], before the final norm, begin at position `first_position`; T may exceed S, by
    tokens that the trunk has not seen yet.
    """
    prefix = f"model.mtp.layers.{head}."
    x = draft_inputs(weights, config, tokens, hidden, head)[None]
    positions = first_position + torch.arange(x.shape[1])[None]
    allowed = attention_mask_matrix(torch.ones(x.shape[:2], dtype=torch.bool), config["sliding_window"])
    y = rms_norm(x, weights[prefix + "input_layernorm.weight"], config)
    x = x + attention(y, weights, prefix + "self_attn.", config, True, positions, allowed)
    y = rms_norm(x, weights[prefix + "pre_mlp_layernorm.weight"], config)
    x = x + mlp(y, weights, prefix + "mlp.")
    tied = config.get("tie_word_embeddings", False)
    output = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return linear(rms_norm(x, weights[prefix + "final_layernorm.weight"], config), output)[0]
