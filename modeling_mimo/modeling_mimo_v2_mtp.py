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
"""The MTP heads: a sliding layer each, which pairs hidden states of the trunk with embeddings of later tokens."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mimo_v2 import MiMoV2Config
from .modeling_mimo_v2_base import MiMoV2MLP, MiMoV2RMSNorm
from .modeling_mimo_v2_text import MiMoV2Attention


class MiMoV2MTPLayer(GradientCheckpointingLayer):
    """One MTP head without embedding and output projection, which are the trunk's.

    Head k takes the trunk's hidden state at position i, before the final norm, and the embedding of token i + 1 + k,
    both at position i, and predicts token i + 2 + k. No head reads another head.
    """

    def __init__(self, config: MiMoV2Config, layer_idx: int):
        super().__init__()
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = MiMoV2RMSNorm(hidden_size, eps)
        self.hnorm = MiMoV2RMSNorm(hidden_size, eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.input_layernorm = MiMoV2RMSNorm(hidden_size, eps)
        self.self_attn = MiMoV2Attention(config, layer_idx, "sliding_attention")
        self.pre_mlp_layernorm = MiMoV2RMSNorm(hidden_size, eps)
        self.mlp = MiMoV2MLP(hidden_size, config.intermediate_size, config.hidden_act)
        self.final_layernorm = MiMoV2RMSNorm(hidden_size, eps)

    def combine(self, embeddings: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Embeddings and the trunk's hidden states, [B, S, hidden] each -> the layer's input [B, S, hidden]."""
        return self.eh_proj(torch.cat((self.enorm(embeddings), self.hnorm(hidden_states)), dim=-1))

    def forward(
        self,
        embeddings: torch.Tensor,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            embeddings: [B, S, hidden] of the tokens that come 1 + k after those of `hidden_states`.
            hidden_states: [B, S, hidden] of the trunk before its final norm.
            position_embeddings: cos and sin of a sliding layer at the positions of `hidden_states`.
            attention_mask: as a decoder layer takes it.
            past_key_values: a cache of the heads alone, whose layer k is head k.

        Returns:
            [B, S, hidden], what `lm_head` turns into the logits of head k.
        """
        mixed = self.combine(embeddings, hidden_states)
        attended, _ = self.self_attn(
            self.input_layernorm(mixed),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        mixed = mixed + attended
        mixed = mixed + self.mlp(self.pre_mlp_layernorm(mixed))
        return self.final_layernorm(mixed)


class MiMoV2MTP(nn.Module):
    """The MTP heads of a checkpoint, under their released names."""

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.layers = nn.ModuleList([MiMoV2MTPLayer(config, index) for index in range(config.num_mtp_layers)])


__all__ = ["MiMoV2MTP", "MiMoV2MTPLayer"]
