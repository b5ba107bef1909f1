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
"""Configuration of the audio encoder: `audio_config` of the released config.json files, and its spellings."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import auto_docstring

from .configuration_mimo_v2_vision import raises_value_errors


# released spelling -> canonical name, where only the name differs
RENAMED_KEYS = {
    "input_local_dim": "hidden_size",
    "input_local_layers": "num_hidden_layers",
    "input_local_attn_heads": "num_attention_heads",
    "input_local_head_dim": "head_dim",
    "input_local_intermediate_size": "intermediate_size",
    "input_local_hidden_dropout": "attention_dropout",
}

# released as strings, which may name each channel: "1280", or "1280-1280-..."
STRING_KEYS = ("speech_vocab_size", "speech_zeroemb_idx")

POSITIVE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "audio_channels",
    "group_size",
    "audio_segment_size",
    "speech_vocab_size",
    "out_hidden_size",
)


@raises_value_errors
@auto_docstring(
    checkpoint="XiaomiMiMo/MiMo-V2.5",
    custom_intro="""
    Configuration of the audio encoder of MiMo-V2.5 and V2.6: code embeddings, a transformer inside each group of
    frames, a projection. Reads the released spelling and the canonical names below, and writes the released spelling.
    """,
)
@strict
class MiMoV2AudioConfig(PreTrainedConfig):
    r"""
    attention_dropout (`float`, *optional*, defaults to 0.0):
        Dropout of attention weights in training (released: `input_local_hidden_dropout`).
    audio_channels (`int`, *optional*, defaults to 20):
        Codes per frame, one per level of the audio tokenizer's residual quantizer.
    group_size (`int`, *optional*, defaults to 4):
        Frames that become one token; at 25 frames a second, 6.25 tokens a second.
    speech_vocab_size (`int`, *optional*, defaults to 1280):
        Rows of each channel's embedding (released as a string).
    speech_zeroemb_idx (`int`, *optional*, defaults to 1024):
        The row that stands for "no code" and gets no gradient (released as a string).
    out_hidden_size (`int`, *optional*, defaults to 4096):
        Width of the language model.
    projection_layers (`int`, *optional*, defaults to 2):
        1: one linear layer. 2: two with a GELU between them and four times the input's width.
    add_post_norm (`bool`, *optional*, defaults to `True`):
        Whether a norm follows the last layer.
    input_full_attention (`bool`, *optional*, defaults to `True`):
        Whether a frame sees its whole group, or only itself and what comes before it there.
    audio_segment_size (`int`, *optional*, defaults to 6000):
        Mel frames that the audio tokenizer encodes at once; for the processor.
    rope_theta (`float`, *optional*, defaults to 640000):
        Base of the rotary frequencies of the positions inside a group.
    partial_rotary_factor (`float`, *optional*, defaults to 1.0):
        Share of a head that is rotated.

    ```python
    >>> from modeling_mimo import MiMoV2Config

    >>> MiMoV2Config.from_pretrained("path/to/MiMo-V2.5").audio_config.speech_vocab_size
    1280
    ```
    """

    model_type = "mimo_v2_audio"
    base_config_key = "audio_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    head_dim: int = 64
    attention_dropout: float | int = 0.0
    audio_channels: int = 20
    group_size: int = 4
    audio_segment_size: int = 6000
    speech_vocab_size: int | str = 1280
    speech_zeroemb_idx: int | str = 1024
    out_hidden_size: int = 4096
    projection_layers: int = 2
    add_post_norm: bool = True
    input_full_attention: bool = True
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 640000
    partial_rotary_factor: float | int = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for released, canonical in RENAMED_KEYS.items():
            if released in kwargs:
                value, default = kwargs.pop(released), type(self).__dataclass_fields__[canonical].default
                if getattr(self, canonical) not in (default, value):
                    raise ValueError(
                        f"`audio_config.{released}`: expected {canonical}={getattr(self, canonical)}, got {value!r}."
                    )
                setattr(self, canonical, value)
        self._as_strings = {}
        for field in STRING_KEYS:
            written = getattr(self, field)
            setattr(self, field, self._one_number(field, written))
            self._as_strings[field] = (getattr(self, field), written if isinstance(written, str) else str(written))
        super().__post_init__(**kwargs)
        self._validate()

    def _one_number(self, field: str, written: int | str) -> int:
        """The number of a released string, which may repeat it for each channel."""
        parts = str(written).split("-")
        if not all(part.isascii() and part.isdigit() for part in parts) or len(parts) not in (1, self.audio_channels):
            raise ValueError(
                f"`audio_config.{field}`: expected a number, or one per channel ({self.audio_channels}) joined by "
                f"dashes, got {written!r}."
            )
        # CODEPATH: "1280" in V2.5; MiMo-Audio has a size per channel, "1025-1025-129-..."
        if len(set(parts)) > 1:
            raise NotImplementedError(
                f"`audio_config.{field}`: only one number for all channels is supported, got {written!r}."
            )
        return int(parts[0])

    def _validate(self) -> None:
        """Raises one `ValueError` naming field, expected and got for the first contradiction."""

        def expect(condition: bool, field: str, expected: Any, got: Any) -> None:
            if not condition:
                raise ValueError(f"`audio_config.{field}`: expected {expected}, got {got!r}.")

        for field in POSITIVE_FIELDS:
            expect(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        expect(
            0 <= self.speech_zeroemb_idx < self.speech_vocab_size,
            "speech_zeroemb_idx",
            f"a row below speech_vocab_size={self.speech_vocab_size}",
            self.speech_zeroemb_idx,
        )
        expect(self.projection_layers in (1, 2), "projection_layers", "1 or 2", self.projection_layers)
        expect(0 <= self.attention_dropout < 1, "attention_dropout", "0 to below 1", self.attention_dropout)
        expect(self.rope_theta > 0, "rope_theta", "a positive number", self.rope_theta)
        expect(
            2 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            "partial_rotary_factor",
            f"an even number of rotary dims out of head_dim={self.head_dim}",
            self.partial_rotary_factor,
        )
        expect(self.hidden_act in ACT2FN, "hidden_act", "an activation of Transformers", self.hidden_act)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def to_dict(self) -> dict[str, Any]:
        """The encoder's own fields, in the released spelling; what loading adds (dtype, ...) is the whole model's."""
        values = super().to_dict()
        own = {field.name for field in fields(self)} - {field.name for field in fields(PreTrainedConfig)}
        # the base class expects the version in every nested dictionary, and takes it out
        own |= {"model_type", "transformers_version"}
        output = {name: value for name, value in values.items() if name in own}
        for released, canonical in RENAMED_KEYS.items():
            output[released] = output.pop(canonical)
        for field, (number, written) in self._as_strings.items():
            output[field] = written if output[field] == number else str(output[field])
        return output


__all__ = ["MiMoV2AudioConfig"]
