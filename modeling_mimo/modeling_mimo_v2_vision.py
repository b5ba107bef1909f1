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
"""The vision tower: patches of images and frames to language-model features, with windows over rows and columns."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mimo_v2_vision import MiMoV2VisionConfig
from .modeling_mimo_v2_base import (
    MiMoV2MLP,
    MiMoV2RMSNorm,
    apply_rotary_,
    attend,
    window_attention,
)
from .unknown_names_mimo_v2 import refuses_unknown_names


class PatchLayout(NamedTuple):
    """How the flat list of patches is cut into sequences, one per frame pair, and ordered.

    `runs`: (sequences, patches of each) for neighbours of equal size. `column_order`: the patch at each place when
    merge units run down columns first; `row_order` undoes it. `rotary`: cos and sin [1, patches, head_dim] float32
    per order.
    """

    runs: list[tuple[int, int]]
    column_order: torch.Tensor
    row_order: torch.Tensor
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]]


def frame_runs(grid_thw: torch.Tensor) -> list[tuple[int, int, int]]:
    """(frame pairs, rows, columns) of each medium, neighbours of the same rows and columns taken together."""
    runs = []
    for frames, rows, columns in grid_thw.tolist():
        if runs and runs[-1][1:] == (rows, columns):
            frames += runs.pop()[0]
        runs.append((frames, rows, columns))
    return runs


def merged_order(rows: int, columns: int, merge: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Row and column of each patch of a frame, [rows * columns] each, and the places of its patches when merge units
    are read down columns first. Patches come as units of `merge` x `merge`, units and their patches in reading order.
    """
    shape = (rows // merge, columns // merge, merge, merge)
    row = torch.arange(rows, device=device).view(shape[0], 1, merge, 1).expand(shape).flatten()
    column = torch.arange(columns, device=device).view(1, shape[1], 1, merge).expand(shape).flatten()
    place = torch.arange(rows * columns, device=device).view(*shape[:2], -1)
    return row, column, place.transpose(0, 1).flatten()


class MiMoV2VisionRotaryEmbedding(nn.Module):
    """Two-dimensional rotary tables: a quarter of a head's dims each for sine and cosine pairs of row and column."""

    def __init__(self, config: MiMoV2VisionConfig):
        super().__init__()
        self.config = config
        self.inv_freq = nn.Buffer(self.inverse_frequencies(), persistent=False)

    def inverse_frequencies(self) -> torch.Tensor:
        """[head_dim / 4] float32."""
        half = self.config.head_dim // 2
        return 1.0 / self.config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)

    @torch.no_grad()
    def forward(self, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column [patches] -> cos, sin [1, patches, head_dim] float32, the frequencies written twice."""
        inv_freq = self.inv_freq.float()
        angles = torch.cat((row[:, None] * inv_freq, column[:, None] * inv_freq), dim=-1)[None].repeat(1, 1, 2)
        return angles.cos(), angles.sin()


class MiMoV2VisionAttention(nn.Module):
    """Grouped-query attention inside each frame, over all its patches or a window of them."""

    def __init__(self, config: MiMoV2VisionConfig, block_type: str):
        super().__init__()
        self.block_type, self.sink_type = block_type, config.sink_type
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window = config.head_dim, config.sliding_window
        self.scaling = self.head_dim**-0.5
        rows = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows)
        self.proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size)
        has_sinks = config.use_sink and block_type != "full"
        self.register_parameter("sinks", nn.Parameter(torch.zeros(self.num_heads)) if has_sinks else None)

    def forward(self, hidden_states: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        """[patches, hidden] -> [patches, hidden]."""
        fused = self.qkv(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)[None]
        # narrow, not split: autograd forbids the rotation in place on one of several outputs of a function
        turned = fused.narrow(1, 0, self.num_heads + self.num_key_value_heads)
        apply_rotary_(turned, *layout.rotary["column" if self.block_type == "column" else "row"])
        outputs, start = [], 0
        for count, size in layout.runs:
            run = fused[0].narrow(1, start, count * size).unflatten(1, (count, size)).transpose(0, 1)
            outputs.append(self.attend(*run.split([self.num_heads, *[self.num_key_value_heads] * 2], dim=1)))
            start += count * size
        output = outputs[0] if len(outputs) == 1 else torch.cat([output.flatten(0, 1) for output in outputs])
        return self.proj(output.reshape(len(hidden_states), -1))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[frames, heads, patches, D] -> [frames, patches, heads, D]."""
        if self.block_type == "full":
            return attend(query, key, value, None, False, self.scaling, None).transpose(1, 2)
        sinks = {"first_key_bias": self.sinks}
        # CODEPATH: the publisher's code and vLLM bias the first key, SGLang and llama.cpp have a null logit
        if self.sink_type == "null_logit":
            sinks = {"sinks": self.sinks}
        return window_attention(query, key, value, self.window, self.scaling, **sinks)


class MiMoV2VisionBlock(GradientCheckpointingLayer):
    def __init__(self, config: MiMoV2VisionConfig, block_type: str):
        super().__init__()
        self.norm1 = MiMoV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = MiMoV2VisionAttention(config, block_type)
        self.norm2 = MiMoV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MiMoV2MLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=True)

    def forward(self, hidden_states: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), layout)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class MiMoV2VisionPatchProjection(nn.Conv3d):
    """A convolution whose kernel is one patch: a matrix product with the flattened patch."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.linear(pixel_values, self.weight.flatten(1))


class MiMoV2VisionPatchEmbed(nn.Module):
    def __init__(self, config: MiMoV2VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = MiMoV2VisionPatchProjection(
            config.num_channels, config.hidden_size, kernel, stride=kernel, bias=False
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[patches, channels * frames * patch size squared] -> [patches, hidden]."""
        pixel_values = pixel_values.to(self.proj.weight.dtype)
        return self.proj(pixel_values)


class MiMoV2VisionMerger(nn.Module):
    """The patches of a merge unit side by side -> one feature of the language model's width."""

    def __init__(self, config: MiMoV2VisionConfig):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        # a LayerNorm without bias, as in the publisher's code and the corrected SGLang; vLLM has an RMSNorm here
        self.ln_q = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=False)
        self.mlp = nn.ModuleList(
            [
                nn.Linear(self.width, self.width, bias=False),
                ACT2FN["gelu"],
                nn.Linear(self.width, config.out_hidden_size, bias=False),
            ]
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.ln_q(hidden_states).view(-1, self.width)
        for layer in self.mlp:
            hidden_states = layer(hidden_states)
        return hidden_states


class MiMoV2VisionModel(nn.Module):
    """Vision tower of MiMo-V2.5: 28 blocks over patches of 16 x 16 pixels and two frames."""

    def __init__(self, config: MiMoV2VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = MiMoV2VisionPatchEmbed(config)
        self.rotary_pos_emb = MiMoV2VisionRotaryEmbedding(config)
        self.blocks = nn.ModuleList([MiMoV2VisionBlock(config, block_type) for block_type in config.block_types])
        self.merger = MiMoV2VisionMerger(config)

    @torch.no_grad()
    def patch_layout(self, grid_thw: torch.Tensor, device: torch.device) -> PatchLayout:
        """Sequences, orders and rotary tables of all media: everything that only depends on grids."""
        runs, merge = frame_runs(grid_thw), self.config.spatial_merge_size
        rows, columns, orders, start = [], [], [], 0
        for frames, height, width in runs:
            row, column, order = merged_order(height, width, merge, device)
            offsets = start + torch.arange(frames, device=device)[:, None] * (height * width)
            rows.append(row.repeat(frames))
            columns.append(column.repeat(frames))
            orders.append((offsets + order).flatten())
            start += frames * height * width
        column_order = torch.cat(orders)
        row_order = torch.empty_like(column_order)
        row_order[column_order] = torch.arange(start, device=device)
        cos, sin = self.rotary_pos_emb(torch.cat(rows), torch.cat(columns))
        rotary = {"row": (cos, sin), "column": (cos[:, column_order], sin[:, column_order])}
        return PatchLayout([(f, h * w) for f, h, w in runs], column_order, row_order, rotary)

    def check_inputs(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> None:
        config = self.config
        values = config.num_channels * config.temporal_patch_size * config.patch_size**2
        if pixel_values.dim() != 2 or pixel_values.shape[1] != values:
            raise ValueError(
                f"`pixel_values`: expected [patches, {values}] (channels * frames * patch size squared), "
                f"got {list(pixel_values.shape)}."
            )
        if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
            raise ValueError(f"`grid_thw`: expected [media, 3], got {list(grid_thw.shape)}.")
        merge = config.spatial_merge_size
        wrong = (grid_thw < 1).any(-1) | (grid_thw[:, 1:] % merge).any(-1)
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"`grid_thw[{index}]`: expected positive sizes, rows and columns multiples of {merge}, "
                f"got {grid_thw[index].tolist()}."
            )
        if (patches := int(grid_thw.prod(-1).sum())) != len(pixel_values):
            raise ValueError(f"`pixel_values`: expected {patches} patches for `grid_thw`, got {len(pixel_values)}.")

    @refuses_unknown_names()
    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values: [patches, channels * frames * patch_size**2], media one after the other; patches in merge
                units of 2 x 2, as the image and video processors make them.
            grid_thw: [media, 3], frame pairs, rows and columns of patches.

        Returns:
            [patches / spatial_merge_size**2, out_hidden_size] in the same order.

        Raises:
            ValueError: patches and grids do not fit together, or not the config.
        """
        self.check_inputs(pixel_values, grid_thw)
        hidden_states = self.patch_embed(pixel_values)
        if len(grid_thw):
            layout, order = self.patch_layout(grid_thw, hidden_states.device), "row"
            for block in self.blocks:
                wanted = "column" if block.attn.block_type == "column" else "row"
                if wanted != order:
                    # whole runs of column blocks work in their order
                    order, hidden_states = wanted, hidden_states[getattr(layout, f"{wanted}_order")]
                hidden_states = block(hidden_states, layout)
            if order == "column":
                hidden_states = hidden_states[layout.row_order]
        return self.merger(hidden_states)


__all__ = ["MiMoV2VisionModel"]
