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
"""The audio encoder: codes of the audio tokenizer to language-model features, four frames at a time."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mimo_v2_audio import MiMoV2AudioConfig
from .modeling_mimo_v2_base import MiMoV2MLP, MiMoV2RMSNorm, apply_rotary_, attend
from .unknown_names_mimo_v2 import refuses_unknown_names


# groups of one step: an hour of audio has 22,500, whose MLP states alone would take 1.5 GB in bfloat16
GROUPS_PER_STEP = 1024


class MiMoV2SpeechEmbeddings(nn.ModuleList):
    """One embedding per channel; a frame is the sum of the embeddings of its codes."""

    def __init__(self, config: MiMoV2AudioConfig):
        super().__init__(
            nn.Embedding(config.speech_vocab_size, config.hidden_size, padding_idx=config.speech_zeroemb_idx)
            for _ in range(config.audio_channels)
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """[..., channels] long -> [..., hidden]."""
        tables, channels = list(self), codes.unbind(-1)
        embeddings = tables[0](channels[0])
        # one after the other in the weights' dtype: the publisher's sum, which bfloat16 rounds at each step
        for table, channel in zip(tables[1:], channels[1:]):
            embeddings += table(channel)
        return embeddings


class MiMoV2AudioAttention(nn.Module):
    """Multi-head attention inside each group of frames."""

    def __init__(self, config: MiMoV2AudioConfig):
        super().__init__()
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.is_causal, self.dropout = not config.input_full_attention, config.attention_dropout
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[groups, frames, hidden] -> [groups, frames, hidden]."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        apply_rotary_(query, *rotary)
        apply_rotary_(key, *rotary)
        if self.dropout > 0 and self.training:
            output = F.scaled_dot_product_attention(
                query, key, value, dropout_p=self.dropout, is_causal=self.is_causal, scale=self.scaling
            )
        else:
            output = attend(query, key, value, None, self.is_causal, self.scaling, None)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class MiMoV2AudioLayer(GradientCheckpointingLayer):
    def __init__(self, config: MiMoV2AudioConfig):
        super().__init__()
        self.input_layernorm = MiMoV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MiMoV2AudioAttention(config)
        self.post_attention_layernorm = MiMoV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MiMoV2MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), rotary)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MiMoV2AudioLocalTransformer(nn.Module):
    """Layers that see one group of frames at a time, at positions 0, 1, 2, ... of each group."""

    def __init__(self, config: MiMoV2AudioConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([MiMoV2AudioLayer(config) for _ in range(config.num_hidden_layers)])
        # CODEPATH: V2.5 and V2.6 have the norm; the models that MiMo-Audio grew out of have none
        self.norm = MiMoV2RMSNorm(config.hidden_size, config.rms_norm_eps) if config.add_post_norm else nn.Identity()

    @torch.no_grad()
    def rotary(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, frames of a group, rotary dims] float32, the frequencies written twice."""
        dim = self.config.rotary_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        positions = torch.arange(self.config.group_size, dtype=torch.float32, device=device)
        angles = (positions[:, None] / self.config.rope_theta**exponents)[None].repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[groups, frames, hidden] -> [groups, frames, hidden]."""
        rotary = self.rotary(hidden_states.device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary)
        return self.norm(hidden_states)


class MiMoV2AudioProjection(nn.Module):
    """The frames of a group side by side -> one feature of the language model's width."""

    def __init__(self, width: int, out_hidden_size: int):
        super().__init__()
        self.mlp = nn.ModuleList(
            [
                nn.Linear(width, 4 * width, bias=False),
                ACT2FN["gelu"],
                nn.Linear(4 * width, out_hidden_size, bias=False),
            ]
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.mlp:
            hidden_states = layer(hidden_states)
        return hidden_states


class MiMoV2AudioEncoder(nn.Module):
    """Audio encoder of MiMo-V2.5: six layers inside each group of four frames, and a projection."""

    def __init__(self, config: MiMoV2AudioConfig):
        super().__init__()
        self.config = config
        self.input_local_transformer = MiMoV2AudioLocalTransformer(config)
        width = config.hidden_size * config.group_size
        # CODEPATH: V2.5 and V2.6 have two layers
        if config.projection_layers == 1:
            self.projection = nn.Linear(width, config.out_hidden_size, bias=False)
        else:
            self.projection = MiMoV2AudioProjection(width, config.out_hidden_size)

    def check_inputs(self, audio_codes: torch.Tensor, lengths: torch.Tensor) -> None:
        channels, codes = self.config.audio_channels, self.config.speech_vocab_size
        for name, tensor in (("audio_codes", audio_codes), ("audio_code_lengths", lengths)):
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise ValueError(f"`{name}`: expected integers, got {tensor.dtype}.")
        if audio_codes.dim() != 2 or audio_codes.shape[1] != channels:
            raise ValueError(
                f"`audio_codes`: expected [frames, {channels}] (one column per channel), "
                f"got {list(audio_codes.shape)}."
            )
        if lengths.dim() != 1:
            raise ValueError(f"`audio_code_lengths`: expected [audios], got {list(lengths.shape)}.")
        if (lengths < 1).any():
            index = int((lengths < 1).nonzero()[0])
            raise ValueError(f"`audio_code_lengths[{index}]`: expected at least 1 frame, got {int(lengths[index])}.")
        if (frames := int(lengths.sum())) != len(audio_codes):
            raise ValueError(
                f"`audio_codes`: expected {frames} frames for `audio_code_lengths`, got {len(audio_codes)}."
            )
        wrong = (audio_codes < 0) | (audio_codes >= codes)
        if wrong.any():
            frame, channel = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"`audio_codes[{frame}, {channel}]`: expected a code from 0 to {codes - 1}, "
                f"got {int(audio_codes[frame, channel])}."
            )

    @torch.no_grad()
    def group_frames(self, audio_codes: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """[sum of lengths, channels] -> [groups, frames of a group, channels] long; each audio fills its last group
        by repeating its last frame."""
        size, device = self.config.group_size, audio_codes.device
        frames, start = [torch.arange(0, device=device)], 0
        for length in lengths:
            places = torch.arange(-(-length // size) * size, device=device)
            frames.append(start + places.clamp(max=length - 1))
            start += length
        return audio_codes[torch.cat(frames)].long().unflatten(0, (-1, size))

    @refuses_unknown_names()
    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[groups, frames of a group, hidden] -> [groups, out_hidden_size]."""
        return self.projection(self.input_local_transformer(embeddings).flatten(1))


__all__ = ["MiMoV2AudioEncoder", "MiMoV2SpeechEmbeddings"]
