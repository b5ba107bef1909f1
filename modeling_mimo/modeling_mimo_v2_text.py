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
"""The MiMo-V2 decoder: attention with two geometries, the expert router, experts, and the layer stack."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.distributed.utils import is_dtensor
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from .cache_names_mimo_v2 import takes_cache
from .configuration_mimo_v2 import MiMoV2Config
from .modeling_mimo_v2_base import (
    MiMoV2MLP,
    MiMoV2RMSNorm,
    apply_rotary_,
    eager_attention_forward,
    sdpa_attention_forward,
)


# this file's "sdpa" merges sinks; Transformers' own would drop them without a word
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward

# tokens of one projection of queries, keys and values
PROJECTION_STEP = 4096

# average rows per expert and chunk of tokens: enough for full speed, while the copies of hidden states stay bounded
ROWS_PER_EXPERT = 512

# from so many rows on, an expert's rows are rounded up to a multiple
FEW_ROWS, ROW_MULTIPLE = 256, 32


class MiMoV2RotaryEmbedding(nn.Module):
    """Partial rotary tables, one inverse-frequency buffer per layer type."""

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.config = config
        # the MTP heads are sliding layers, whatever the trunk has
        self.layer_types = sorted({*config.layer_types, "sliding_attention"})
        for layer_type in self.layer_types:
            self.register_buffer(f"{layer_type}_inv_freq", self.inverse_frequencies(layer_type), persistent=False)

    def inverse_frequencies(self, layer_type: str) -> torch.Tensor:
        """[rotary dims / 2] float32; `int(head_dim * partial_rotary_factor)` dims rotate, 64 of 192 when released."""
        rope = self.config.rope_parameters[layer_type]
        head_dim = self.config.attention_geometry(layer_type).head_dim
        rotary_dim = int(head_dim * rope["partial_rotary_factor"])
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)

    @torch.no_grad()
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` [B or 1, S] -> cos, sin [B or 1, S, rotary dims] in the dtype of `hidden_states`."""
        inv_freq = getattr(self, f"{layer_type}_inv_freq").float()
        frequencies = position_ids[..., None].float() * inv_freq.to(position_ids.device)
        angles = torch.cat((frequencies, frequencies), dim=-1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


class MiMoV2Attention(nn.Module):
    """Grouped-query attention of one layer type; queries and keys are wider (192) than values (128)."""

    def __init__(self, config: MiMoV2Config, layer_idx: int, layer_type: str):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.geometry = config.attention_geometry(layer_type)
        self.scaling = self.geometry.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.num_key_value_groups = self.geometry.num_heads // self.geometry.num_key_value_heads
        sizes, hidden_size = self.geometry.qkv_sizes, config.hidden_size
        # CODEPATH: V2.5, V2.5-Pro and V2.6 have one fused projection, V2-Flash three
        if config.attention_projection_layout == "fused_qkv":
            self.qkv_proj = nn.Linear(hidden_size, sum(sizes), bias=config.attention_bias)
        else:
            self.q_proj = nn.Linear(hidden_size, sizes[0], bias=config.attention_bias)
            self.k_proj = nn.Linear(hidden_size, sizes[1], bias=config.attention_bias)
            self.v_proj = nn.Linear(hidden_size, sizes[2], bias=config.attention_bias)
        self.o_proj = nn.Linear(self.geometry.num_heads * self.geometry.v_head_dim, hidden_size, bias=False)
        sinks = nn.Parameter(torch.zeros(self.geometry.num_heads)) if self.geometry.has_sinks else None
        self.register_parameter("attention_sink_bias", sinks)

    @property
    def sinks(self) -> torch.Tensor | None:
        """[heads of this rank] or None."""
        sinks = self.attention_sink_bias
        return sinks.to_local() if is_dtensor(sinks) else sinks

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, S, hidden] -> query, key, scaled value as [B, heads of each, S, head dim of each].

        A fused projection keeps the row order of the checkpoint: `[Q | K | V]` per chunk, one chunk per global KV
        head (whole chunks go to a tensor-parallel rank); FP8 kernels may have padded each chunk at its end.
        """
        # CODEPATH: V2-Flash is split
        if self.config.attention_projection_layout == "split":
            parts = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        else:
            # CODEPATH: releases are chunked; "plain" is what re-exporters write under the same tag
            chunks = 1 if self.config.fused_qkv_layout == "plain" else self.geometry.qkv_chunks
            sizes = [size // chunks for size in self.geometry.qkv_sizes]
            fused = self.qkv_proj(hidden_states)
            # tensor parallelism leaves a rank its share of the chunks
            chunks = chunks * fused.shape[-1] // self.qkv_proj.out_features
            fused = fused.unflatten(-1, (chunks, -1))
            # narrow, not split: autograd forbids the rotation in place on one of several outputs of a function
            starts = (0, sizes[0], sizes[0] + sizes[1])
            parts = [fused.narrow(-1, start, size) for start, size in zip(starts, sizes)]
        # scaled before the heads are separated, which copies: one copy of the values instead of two
        parts = (*parts[:2], parts[2] * self.config.attention_value_scale)
        dims = (self.geometry.head_dim, self.geometry.head_dim, self.geometry.v_head_dim)
        return tuple(
            part.reshape(*hidden_states.shape[:-1], -1, dim).transpose(1, 2) for part, dim in zip(parts, dims)
        )

    def project_in_steps(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """`project`, where gradients are off in steps along the sequence: the fused rows of a long prompt would be the
        largest tensor of the layer, and new memory pages for it cost more than the product's share."""
        if torch.is_grad_enabled() or hidden_states.shape[1] <= PROJECTION_STEP:
            return self.project(hidden_states)
        whole, start = None, 0
        for step in hidden_states.split(PROJECTION_STEP, dim=1):
            parts = self.project(step)
            if whole is None:
                shapes = [(part.shape[0], hidden_states.shape[1], part.shape[1], part.shape[3]) for part in parts]
                whole = [part.new_empty(shape).transpose(1, 2) for part, shape in zip(parts, shapes)]
            for target, part in zip(whole, parts):
                target[:, :, start : start + step.shape[1]] = part
            start += step.shape[1]
        return whole

    # layers hand on what they are called with, also by hand
    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.project_in_steps(hidden_states)
        if query.requires_grad:
            # autograd forbids the rotation in place on views of what bitsandbytes' own functions return
            query, key = query.clone(), key.clone()
        query, key = apply_rotary_(query, *position_embeddings), apply_rotary_(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            sliding_window=self.geometry.window,
            s_aux=self.sinks,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class MiMoV2Router(nn.Module):
    """Sigmoid top-k router (`noaux_tc`): the correction bias chooses the experts and never weighs them."""

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        # CODEPATH: V2.6 routes in bfloat16, V2.5, V2.5-Pro and V2-Flash in float32
        self.compute_dtype = torch.bfloat16 if config.moe_router_dtype == "bfloat16" else torch.float32
        # float32 from birth, whatever the model's dtype: disk offload takes the dtype from here
        dtype = torch.float32 if self.compute_dtype == torch.float32 else None
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=dtype))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[tokens, hidden] -> logits [tokens, experts], weights [tokens, k] float32, indices [tokens, k]."""
        logits = F.linear(hidden_states.to(self.compute_dtype), self.weight.to(self.compute_dtype)).float()
        scores = logits.sigmoid()
        choice = scores + self.e_score_correction_bias.float()
        if self.n_group > 1:
            choice = self.mask_groups(choice)
        indices = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices

    def mask_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """Leaves only the experts of the `topk_group` groups whose two best scores sum highest."""
        grouped = choice.unflatten(-1, (self.n_group, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
        hidden = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(hidden[..., None], -torch.inf).flatten(-2)


@use_experts_implementation
class MiMoV2Experts(nn.Module):
    """Gated MLP experts stacked along the first dimension; the eager form below is the fastest on a CPU."""

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]
        # name -> matrix of each expert, while a forward with gradients runs
        self.matrices: dict[str, tuple[torch.Tensor, ...]] = {}

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes tensors per expert as well. A Trainer resumes from the files that `save_pretrained` wrote, in their
        released names, and would go on with the experts it has after a mere warning."""
        gate, up = self.gate_up_proj.chunk(2, dim=1)
        targets = (("gate_proj", "gate_up_proj", gate), ("up_proj", "gate_up_proj", up))
        targets += (("down_proj", "down_proj", self.down_proj),)
        # codes of a byte and less have scales beside them
        for kind, name, target in targets if self.gate_up_proj.element_size() > 1 else ():
            for expert in range(self.num_experts):
                # files are loaded one after the other, of which each has some of the experts
                if (tensor := state_dict.pop(f"{prefix}{expert}.{kind}.weight", None)) is not None:
                    target[expert].copy_(tensor)
                    state_dict[prefix + name] = getattr(self, name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's matrix of "gate_up_proj" `[2 * intermediate, hidden]` or "down_proj" `[hidden, intermediate]`,
        for input of `dtype`."""
        return self.matrices.get(name, getattr(self, name))[expert]

    def expert_weights(self, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Both matrices of one expert."""
        return self.expert_weight("gate_up_proj", expert, dtype), self.expert_weight("down_proj", expert, dtype)

    def project(self, name: str, expert: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, in] times one expert's matrix: where adapters come in."""
        return F.linear(hidden_states, self.expert_weight(name, expert, hidden_states.dtype))

    def run_expert(self, expert: int, hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] of one expert, times the routing `weights` [tokens, 1] of its tokens."""
        gate, up = self.project("gate_up_proj", expert, hidden_states).chunk(2, dim=-1)
        # weighing here, where the rows are narrow, is the same sum and half the memory traffic
        return self.project("down_proj", expert, (self.act_fn(gate) * up * weights).to(hidden_states.dtype))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, hidden], indices and weights [tokens, k] -> [tokens, hidden], summed in float32."""
        if torch.compiler.is_compiling() and type(self) is MiMoV2Experts:
            # a graph cannot ask which experts were hit; copying weights per token pays for few tokens alone
            few = hidden_states.shape[0] * top_k_index.shape[-1] <= self.num_experts
            compiled = ALL_EXPERTS_FUNCTIONS["batched_mm" if few else "grouped_mm"]
            return compiled(self, hidden_states, top_k_index, top_k_weights)
        size = ROWS_PER_EXPERT * self.num_experts // top_k_index.shape[-1]
        chunks = zip(*(part.split(size) for part in (hidden_states, top_k_index, top_k_weights)))
        with self.taken_apart():
            return torch.cat([self.run_chunk(*chunk) for chunk in chunks])

    @contextmanager
    def taken_apart(self) -> Iterator[None]:
        """Takes all experts out of the stacked weights at once, where they learn: the gradient of one that is taken
        alone is as large as that of all experts."""
        if torch.is_grad_enabled() and self.gate_up_proj.requires_grad and not is_dtensor(self.gate_up_proj):
            self.matrices = {name: getattr(self, name).unbind() for name in ("gate_up_proj", "down_proj")}
        try:
            yield
        finally:
            self.matrices = {}

    def run_chunk(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`forward` for a bounded number of tokens.

        Tokens are sorted by expert once, so that each hit expert runs one matrix product on a contiguous slice. An
        index equal to the number of experts marks an expert of another rank (expert parallelism) and is skipped.
        """
        tokens, top_k = top_k_index.shape
        sorted_experts, order = top_k_index.flatten().sort(stable=True)
        hit, counts = torch.unique_consecutive(sorted_experts, return_counts=True)
        states, weights = hidden_states[order // top_k], top_k_weights.flatten()[order, None]
        outputs, start = [], 0
        for expert, count in zip(hit.tolist(), counts.tolist()):
            # reaching into the next expert's rows costs less than another matrix shape, for which the CPU library
            # compiles and keeps another kernel (0.8 ms and 0.5 MB each)
            rows = count if count < FEW_ROWS else -(-count // ROW_MULTIPLE) * ROW_MULTIPLE
            inputs = states[start : start + rows], weights[start : start + rows]
            output = torch.zeros_like(inputs[0]) if expert == self.num_experts else self.run_expert(expert, *inputs)
            outputs.append(output[:count])
            start += count
        restored = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        # a sum of bfloat16 is accumulated in float32 and rounded once
        return torch.cat(outputs)[restored].view(tokens, top_k, -1).sum(dim=1)


class MiMoV2MoE(nn.Module):
    """Router and experts; no shared experts in this family."""

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.gate = MiMoV2Router(config)
        self.experts = MiMoV2Experts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.flatten(0, -2)
        _, weights, indices = self.gate(flat)
        return self.experts(flat, indices, weights).view_as(hidden_states)


class MiMoV2DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MiMoV2Config, layer_idx: int):
        super().__init__()
        self.self_attn = MiMoV2Attention(config, layer_idx, config.layer_types[layer_idx])
        # CODEPATH: layer 0 of every release is dense, the others are sparse
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.mlp = MiMoV2MoE(config)
        else:
            self.mlp = MiMoV2MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = MiMoV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MiMoV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


__all__ = ["MiMoV2Attention", "MiMoV2DecoderLayer", "MiMoV2Experts", "MiMoV2MoE", "MiMoV2RotaryEmbedding"]
