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

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import auto_docstring

from .cache_names_mimo_v2 import has_both_names
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
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            embeddings: [B, S, hidden] of the tokens that come 1 + k after those of `hidden_states`.
            hidden_states: [B, S, hidden] of the trunk before its final norm.
            position_embeddings: cos and sin of a sliding layer at the positions of `hidden_states`.
            attention_mask: as a decoder layer takes it.
            cache: a cache of the heads alone, whose layer k is head k.

        Returns:
            [B, S, hidden], what `lm_head` turns into the logits of head k.
        """
        mixed = self.combine(embeddings, hidden_states)
        attended, _ = self.self_attn(
            self.input_layernorm(mixed),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
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

    def forward(self, embeddings: torch.Tensor, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        """What each head says at every position, for training.

        Args:
            embeddings, hidden_states: [B, S, hidden] that go into the trunk, and that come out before its final norm.
            kwargs: position embeddings and mask of a sliding layer.

        Returns:
            Per head k [B, S, hidden] for `lm_head`; the last 1 + k positions, whose next tokens are not in the
            sequence, mean nothing.
        """
        outputs = []
        for head, layer in enumerate(self.layers):
            later = F.pad(embeddings[:, 1 + head :], (0, 0, 0, min(1 + head, embeddings.shape[1])))
            outputs.append(layer(later, hidden_states, **kwargs))
        return tuple(outputs)

    def replicate(self, count: int) -> None:
        """Makes the heads `count` copies of the first one."""
        copies = [copy.deepcopy(self.layers[0]) for _ in range(count - 1)]
        for index, layer in enumerate(copies, start=1):
            layer.self_attn.layer_idx = index
        self.layers = nn.ModuleList([self.layers[0], *copies])


def mtp_targets(
    labels: torch.Tensor, head: int, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """[B, S] what `head` is to say at every position: the label 2 + head tokens later, -100 where there is none.

    Args:
        attention_mask: [B, S]; nothing is said at padding. Masks of another form do not tell.
        position_ids: [B, S] or [1, S]; a token of another packed sequence is no target.
    """
    distance = 2 + head
    targets = F.pad(labels[:, distance:], (0, min(distance, labels.shape[1])), value=-100)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == labels.shape:
        targets = targets.masked_fill(attention_mask == 0, -100)
    if position_ids is None or labels.shape[1] <= distance:
        return targets
    follows = position_ids[:, distance:] - position_ids[:, :-distance] == distance
    return targets.masked_fill(~F.pad(follows, (0, distance)), -100)


@has_both_names
@auto_docstring(custom_intro="What the trunk returns, and the MTP heads where they were asked to run.")
@dataclass
class MiMoV2ModelOutputWithPast(MoeModelOutputWithPast):
    r"""
    mtp_hidden_states (`tuple[torch.Tensor]`, *optional*):
        Of each MTP head `(batch_size, sequence_length, hidden_size)`, for `lm_head`.
    """

    mtp_hidden_states: tuple[torch.Tensor, ...] | None = None


@has_both_names
@auto_docstring(custom_intro="Logits, and losses for `labels`.")
@dataclass
class MiMoV2CausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    mtp_losses (`tuple[torch.Tensor]`, *optional*):
        Of each MTP head, unweighted, where they are part of `loss`.
    """

    mtp_losses: tuple[torch.Tensor, ...] | None = None


class MiMoV2MTPTrainingMixin:
    """What MiMoV2ForCausalLM needs to train its MTP heads."""

    def mtp_losses(
        self,
        mtp_hidden_states: tuple[torch.Tensor, ...],
        labels: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        shift_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, ...]:
        """Loss of each MTP head, aligned as `generate` uses them: head k at position i against the token i + 2 + k.

        `shift_labels` take the place of `labels`, as in Transformers: position i holds the token i + 1.
        """
        if shift_labels is not None:
            labels = F.pad(shift_labels, (1, 0), value=-100)[:, :-1]
        losses = []
        for head, hidden_states in enumerate(mtp_hidden_states):
            targets = mtp_targets(labels, head, attention_mask, position_ids)
            logits = self.lm_head(hidden_states)
            # a sequence too short for this head has no target, of which the mean would be NaN
            if bool((targets == -100).all()):
                losses.append(logits.sum() * 0.0)
                continue
            losses.append(self.loss_function(logits, labels, self.vocab_size, shift_labels=targets, **kwargs))
        return tuple(losses)

    def replicate_mtp_head(self, count: int = 3) -> None:
        """Replaces the MTP heads by `count` copies of the first one, to be trained together.

        The released recipe: one head is pre-trained beside the trunk, copied to three, and these are trained jointly.

        Raises:
            ValueError: the model has no head; a count below 1.
        """
        if self.model.mtp is None:
            raise ValueError("`replicate_mtp_head`: expected a model with an MTP head, got one without.")
        if count < 1:
            raise ValueError(f"`count`: expected at least 1, got {count!r}.")
        self.model.mtp.replicate(count)
        self.config.num_mtp_layers = count


__all__ = [
    "MiMoV2CausalLMOutputWithPast",
    "MiMoV2MTP",
    "MiMoV2MTPLayer",
    "MiMoV2MTPTrainingMixin",
    "MiMoV2ModelOutputWithPast",
]
