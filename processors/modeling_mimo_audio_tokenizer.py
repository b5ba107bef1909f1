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
"""The audio tokenizer of MiMo-V2.5: mel frames -> a causal transformer -> 20 codes per 40 ms by residual quantization.

Segments of different lengths are packed: their rows lie one behind the other in every product of matrices, and only
attention and the convolutions look at each segment by itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import auto_docstring, logging

from .configuration_mimo_audio_tokenizer import MiMoAudioTokenizerConfig


logger = logging.get_logger(__name__)

# mel frames that are encoded at a time, two minutes: bounds memory, and more would not make products faster
STEP_FRAMES = 12000

# rows of every product are a multiple of it. Libraries round differently for a handful of rows, which could flip a
# code, and the CPU library compiles and keeps a kernel per shape
ROW_MULTIPLE = 64

# rows of the wide part of a layer, and of the quantizer, at a time: what they compute with stays in the caches
MLP_ROWS, QUANTIZER_ROWS = 1024, 512

# blocks of queries of a sliding layer per call, for the same reason
WINDOW_BLOCKS = 16


@auto_docstring(custom_intro="Codes of segments one behind the other.")
@dataclass
class MiMoAudioTokenizerOutput(ModelOutput):
    r"""
    audio_codes (`torch.LongTensor` of shape `(frames, num_quantizers)`):
        Codes of all segments, 25 frames per second, from the coarsest level to the finest.
    audio_code_lengths (`torch.LongTensor` of shape `(segments,)`):
        Code frames of each segment.
    """

    audio_codes: torch.LongTensor | None = None
    audio_code_lengths: torch.LongTensor | None = None


class Packing(NamedTuple):
    """Where segments lie in packed rows, and the blocks of queries and keys that sliding layers see.

    `lengths`: rows of each segment. `queries` [blocks, w] and `keys` [blocks, 2 w]: rows of each block of `w` queries,
    and of the keys from `w` before it on. `visible`: [blocks, 1, w, 2 w] bool. `places` [rows]: where each row is
    among all queries. `rotary`: cosine and sine, [rows, 1, head_dim / 2] in the dtype of the states.
    """

    lengths: list[int]
    queries: torch.Tensor
    keys: torch.Tensor
    visible: torch.Tensor
    places: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]


def padded_rows(states: torch.Tensor) -> torch.Tensor:
    """`states` [rows, width] with rows of zeros up to a multiple of ROW_MULTIPLE."""
    return F.pad(states, (0, 0, 0, -len(states) % ROW_MULTIPLE))


def windows(states: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """What each place of a convolution sees: [length, width] -> [ceil(length / stride), width * kernel].

    Zeros stand before and behind a segment, behind it as many as its last place needs.
    """
    behind = (-(-len(states) // stride) - 1) * stride + kernel - padding - len(states)
    return F.pad(states, (0, 0, padding, behind)).unfold(0, kernel, stride).flatten(1)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates [rows, heads, D] in halves; cosine and sine [rows, 1, D / 2]."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MiMoAudioTokenizerConv(nn.Conv1d):
    """A convolution over packed segments as one product of matrices."""

    def forward(self, segments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """[length, in] of each segment -> [places, out] of all, and how many places each has."""
        seen = [windows(s, self.kernel_size[0], self.stride[0], self.padding[0]) for s in segments]
        lengths = [len(segment) for segment in seen]
        output = F.linear(padded_rows(torch.cat(seen)), self.weight.flatten(1), self.bias)
        return F.gelu(output[: sum(lengths)]), lengths


class MiMoAudioTokenizerAttention(nn.Module):
    """Causal attention inside each segment, over all positions or a window of them."""

    def __init__(self, config: MiMoAudioTokenizerConfig, layer_type: str):
        super().__init__()
        self.layer_type, self.head_dim = layer_type, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, packing: Packing) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden]."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary(query, *packing.rotary), apply_rotary(key, *packing.rotary)
        if hidden_states.device.type == "cpu":
            # the CPU kernel is faster in float32 than in bfloat16 (docs/benchmarks.md)
            query, key, value = query.float(), key.float(), value.float()
        attend = self.attend_all if self.layer_type == "full_attention" else self.attend_window
        return self.out_proj(attend(query, key, value, packing).flatten(1).to(hidden_states.dtype))

    @staticmethod
    def attend_all(query, key, value, packing: Packing) -> torch.Tensor:
        """[rows, heads, D] -> [rows, heads, D], segment by segment: what one gives depends on no other."""
        output = torch.zeros_like(query)
        start = 0
        for length in packing.lengths:
            rows = slice(start, start + length)
            states = (part[rows].transpose(0, 1)[None] for part in (query, key, value))
            output[rows] = F.scaled_dot_product_attention(*states, is_causal=True)[0].transpose(0, 1)
            start += length
        return output

    @staticmethod
    def attend_window(query, key, value, packing: Packing) -> torch.Tensor:
        """The same with blocks of all segments, in time and memory linear in the rows."""
        outputs = []
        for rows, seen, visible in zip(*(part.split(WINDOW_BLOCKS) for part in packing[1:4])):
            states = (query[rows], key[seen], value[seen])
            states = (part.transpose(1, 2) for part in states)
            outputs.append(F.scaled_dot_product_attention(*states, attn_mask=visible).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[packing.places]


class MiMoAudioTokenizerLayer(GradientCheckpointingLayer):
    def __init__(self, config: MiMoAudioTokenizerConfig, layer_type: str):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = MiMoAudioTokenizerAttention(config, layer_type)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, packing: Packing) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.self_attn_layer_norm(hidden_states), packing)
        parts = self.final_layer_norm(hidden_states).split(MLP_ROWS)
        return hidden_states + torch.cat([self.fc2(self.act_fn(self.fc1(part))) for part in parts])


class MiMoAudioTokenizerCodebook(nn.Module):
    """One level of the quantizer. Of its tensors only `embed` is used; the others are of its training."""

    def __init__(self, config: MiMoAudioTokenizerConfig, size: int):
        super().__init__()
        self.reference_dtype = getattr(torch, config.reference_dtype)
        self.embed = nn.Buffer(torch.zeros(size, config.hidden_size))
        self.embed_avg = nn.Buffer(torch.zeros(size, config.hidden_size))
        self.cluster_size = nn.Buffer(torch.zeros(size))
        self.inited = nn.Buffer(torch.ones(1))

    def entries(self) -> torch.Tensor:
        """[size, hidden] float32, rounded as in the code that made the codes of the language model."""
        return self.embed.to(self.reference_dtype).float()


class MiMoAudioTokenizerLevel(nn.Module):
    def __init__(self, config: MiMoAudioTokenizerConfig, size: int):
        super().__init__()
        self._codebook = MiMoAudioTokenizerCodebook(config, size)


class MiMoAudioTokenizerResidualQuantizer(nn.Module):
    """Each level takes the nearest entry to what the levels before it left, in float32."""

    def __init__(self, config: MiMoAudioTokenizerConfig):
        super().__init__()
        self.layers = nn.ModuleList([MiMoAudioTokenizerLevel(config, size) for size in config.codebook_size])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> codes [rows, levels]."""
        books = [level._codebook.entries() for level in self.layers]
        squares = [entries.pow(2).sum(1) for entries in books]
        codes = torch.empty(len(hidden_states), len(books), dtype=torch.long, device=hidden_states.device)
        parts = zip(hidden_states.float().split(QUANTIZER_ROWS), codes.split(QUANTIZER_ROWS))
        for residual, found in parts:
            for level, (entries, square) in enumerate(zip(books, squares)):
                # the order of the publisher's sum: another one rounds otherwise and decides close calls otherwise
                distances = residual.pow(2).sum(1, keepdim=True) - 2 * residual @ entries.T + square
                found[:, level] = distances.argmin(dim=-1)
                residual = residual - entries[found[:, level]]
        return codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """[frames, levels] -> [frames, hidden] float32, the sum of the entries."""
        return sum(level._codebook.entries()[code] for level, code in zip(self.layers, codes.T))


class MiMoAudioTokenizerQuantizer(nn.Module):
    def __init__(self, config: MiMoAudioTokenizerConfig):
        super().__init__()
        self.vq = MiMoAudioTokenizerResidualQuantizer(config)

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = len(hidden_states)
        return self.vq(padded_rows(hidden_states))[:rows]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.vq.decode(codes)


class MiMoAudioTokenizerEncoder(nn.Module):
    """Two convolutions, transformer layers with a skip connection, pooling, and the quantizer."""

    def __init__(self, config: MiMoAudioTokenizerConfig):
        super().__init__()
        self.config = config
        width, kernel, pool = config.hidden_size, config.kernel_size, config.pooling_size
        self.conv1 = MiMoAudioTokenizerConv(config.num_mel_bins, width, kernel, padding=kernel // 2)
        self.conv2 = MiMoAudioTokenizerConv(width, width, kernel, config.stride_size, kernel // 2)
        self.layers = nn.ModuleList([MiMoAudioTokenizerLayer(config, kind) for kind in config.layer_types])
        self.layer_norm = nn.LayerNorm(width)
        self.down_sample_layer = nn.ModuleList([MiMoAudioTokenizerConv(width, width, pool, pool, bias=False)])
        self.down_sample_norm = nn.LayerNorm(width)
        self.quantizer = MiMoAudioTokenizerQuantizer(config)

    def packing(self, lengths: list[int], like: torch.Tensor) -> Packing:
        """What all layers need to know of segments of these lengths (in rows, after the convolutions)."""
        device, size = like.device, self.config.sliding_window
        rows = sum(lengths)
        within = torch.cat([torch.arange(length, device=device) for length in lengths])
        starts, queries, visible, first_block = [], [], [], []
        row, column = torch.arange(size, device=device)[:, None], torch.arange(2 * size, device=device) - size
        band = (column <= row) & (column >= row - size)
        start = blocks = 0
        for length in lengths:
            count = -(-length // size)
            begin = torch.arange(0, count * size, size, device=device)
            key = begin[:, None] + column
            visible.append(band & ((key >= 0) & (key < length))[:, None])
            starts.append((start + key).clamp(0, rows - 1))
            queries.append((start + begin[:, None] + row.T).clamp(max=rows - 1))
            first_block += [blocks * size] * length
            start, blocks = start + length, blocks + count
        tail = -rows % ROW_MULTIPLE
        # the rows of zeros at the end may be anywhere
        places = F.pad(within + torch.tensor(first_block, device=device), (0, tail))
        cos, sin = self.rotary(max(lengths), like)
        rotary = tuple(F.pad(table[within], (0, 0, 0, tail))[:, None] for table in (cos, sin))
        visible = torch.cat(visible)[:, None]
        return Packing(lengths, torch.cat(queries), torch.cat(starts), visible, places, rotary)

    def rotary(self, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every position, [length, head_dim / 2] in the dtype of `like`."""
        dim, device = self.config.head_dim, like.device
        inv_freq = 1.0 / self.config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        inv_freq = inv_freq.to(getattr(torch, self.config.reference_dtype)).float()
        angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inv_freq
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(self, segments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """Mel frames [frames, num_mel_bins] of each segment -> codes [code frames, levels] of all, and how many code
        frames each has."""
        hidden_states, lengths = self.conv1(segments)
        hidden_states, lengths = self.conv2(hidden_states.split(lengths))
        hidden_states = padded_rows(hidden_states)
        packing = self.packing(lengths, hidden_states)
        skipped = 0
        for number, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states, packing)
            # CODEPATH: V2.5 and V2.6 add layer 3 to the last one
            if number == self.config.skip_layer_id:
                skipped = hidden_states
        hidden_states = self.layer_norm(hidden_states + skipped)[: sum(lengths)]
        hidden_states, lengths = self.down_sample_layer[0](hidden_states.split(lengths))
        return self.quantizer.encode(self.down_sample_norm(hidden_states)), lengths


@auto_docstring(
    custom_intro="""
    The frozen codec that turns sound into what the language model hears: 25 frames of 20 codes per second.

    `from_pretrained(repo_or_dir, subfolder="audio_tokenizer")` takes the folder as released; the decoder of V2.6's
    file is left aside.
    """
)
class MiMoAudioTokenizer(PreTrainedAudioTokenizerBase):
    config: MiMoAudioTokenizerConfig
    config_class = MiMoAudioTokenizerConfig
    base_model_prefix = "encoder"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    _no_split_modules = ["MiMoAudioTokenizerLayer"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["_codebook"]
    # the decoder in V2.6's file: 379 tensors that make sound of codes, which no released model emits
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.(dconv[12]|layer_norm|layers|vocoder|mel_loss_fn)\."]

    def __init__(self, config: MiMoAudioTokenizerConfig):
        super().__init__(config)
        self.encoder = MiMoAudioTokenizerEncoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MiMoAudioTokenizerCodebook):
            init.normal_(module.embed)
            init.copy_(module.embed_avg, module.embed)
            init.zeros_(module.cluster_size)
            init.ones_(module.inited)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """As in Transformers, in the dtype of the files unless `dtype` says otherwise.

        ValueError: the files lack tensors or have unknown ones; all are listed.
        """
        kwargs.setdefault("dtype", "auto")
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        wrong = [f"missing {key}" for key in sorted(info["missing_keys"])]
        wrong += [f"unknown {key}" for key in sorted(info["unexpected_keys"])]
        if wrong:
            raise ValueError(
                f"{pretrained_model_name_or_path}: expected the tensors of an audio tokenizer, got {', '.join(wrong)}"
            )
        return (model, info) if output_loading_info else model

    def code_length(self, frames: int) -> int:
        """Code frames of a segment of so many mel frames."""
        return -(-frames // self.config.frames_per_code)

    @torch.no_grad()
    def encode_segments(self, segments: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Mel frames [frames, num_mel_bins] of each segment -> its codes [code frames, num_quantizers].

        Takes segments as it needs them, at most STEP_FRAMES mel frames at a time, so that an iterator over an hour
        of sound takes no more memory than two minutes. A segment's codes do not depend on its neighbours.

        ValueError: a segment of another shape, or without frames.
        """
        step, frames = [], 0
        for index, segment in enumerate(segments):
            self._check_segment(segment, index)
            if step and frames + len(segment) > STEP_FRAMES:
                yield from self._encode_step(step)
                step, frames = [], 0
            step.append(segment)
            frames += len(segment)
        if step:
            yield from self._encode_step(step)

    def _encode_step(self, segments: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        like = self.encoder.conv1.weight
        # to an offloaded encoder accelerate's hook brings the input
        device = None if like.device.type == "meta" else like.device
        codes, lengths = self.encoder([segment.to(device=device, dtype=like.dtype) for segment in segments])
        return codes.split(lengths)

    def _check_segment(self, segment: torch.Tensor, index: int) -> None:
        bins = self.config.num_mel_bins
        if segment.dim() != 2 or segment.shape[1] != bins or len(segment) == 0:
            raise ValueError(
                f"`input_features[{index}]`: expected at least one mel frame, [frames, {bins}], "
                f"got {list(segment.shape)}."
            )

    def encode(
        self, input_features: torch.Tensor, feature_lengths: torch.Tensor | None = None
    ) -> MiMoAudioTokenizerOutput:
        """
        Args:
            input_features: [segments, frames, num_mel_bins], padded behind, as the feature extractor makes them.
            feature_lengths: [segments], mel frames of each; None for all of them.

        Raises:
            ValueError: another shape, or a length that the features do not have.
        """
        if input_features.dim() != 3:
            raise ValueError(
                f"`input_features`: expected [segments, frames, {self.config.num_mel_bins}], "
                f"got {list(input_features.shape)}."
            )
        segments, frames = input_features.shape[:2]
        lengths = [frames] * segments if feature_lengths is None else torch.as_tensor(feature_lengths).tolist()
        if len(lengths) != segments or any(not 1 <= length <= frames for length in lengths):
            raise ValueError(f"`feature_lengths`: expected {segments} lengths of 1 to {frames} frames, got {lengths}.")
        codes = list(self.encode_segments(part[:length] for part, length in zip(input_features, lengths)))
        if not codes:
            raise ValueError("`input_features`: expected at least one segment, got none.")
        return MiMoAudioTokenizerOutput(
            audio_codes=torch.cat(codes),
            audio_code_lengths=torch.tensor([len(part) for part in codes], device=codes[0].device),
        )

    def forward(
        self, input_features: torch.Tensor, feature_lengths: torch.Tensor | None = None, **kwargs
    ) -> MiMoAudioTokenizerOutput:
        """The same as `encode`."""
        return self.encode(input_features, feature_lengths)

    @torch.no_grad()
    def decode_codes(self, audio_codes: torch.Tensor) -> torch.Tensor:
        """[frames, num_quantizers] -> the quantized features [frames, hidden] float32.

        ValueError: another shape, or a code that its level does not have.
        """
        levels = self.config.num_quantizers
        if audio_codes.dim() != 2 or audio_codes.shape[1] != levels or audio_codes.is_floating_point():
            raise ValueError(
                f"`audio_codes`: expected integers [frames, {levels}], "
                f"got {audio_codes.dtype} {list(audio_codes.shape)}."
            )
        audio_codes = audio_codes.to(self.encoder.conv1.weight.device).long()
        sizes = torch.tensor(self.config.codebook_size, device=audio_codes.device)
        wrong = ((audio_codes < 0) | (audio_codes >= sizes)).nonzero()
        if len(wrong):
            frame, level = wrong[0].tolist()
            raise ValueError(
                f"`audio_codes[{frame}, {level}]`: expected 0 to {sizes[level] - 1}, got {audio_codes[frame, level]}."
            )
        return self.encoder.quantizer.decode(audio_codes)

    def decode(self, audio_codes: torch.Tensor, *args, **kwargs):
        """NotImplementedError: V2.5 has no decoder, and this package does not load V2.6's."""
        raise NotImplementedError("decode: the released tokenizer only encodes; `decode_codes` gives features")


__all__ = ["MiMoAudioTokenizer", "MiMoAudioTokenizerOutput"]
