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
"""Configuration of the audio tokenizer: `audio_tokenizer/config.json` of the releases, and its spellings."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import auto_docstring


# released spelling -> canonical name, where only the name differs
RENAMED_KEYS = {
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
    "activation_function": "hidden_act",
    "encoder_skip_layer_id": "skip_layer_id",
    "n_mels": "num_mel_bins",
    "avg_pooler": "pooling_size",
}

# what every release says, and nothing else is built for
FIXED_KEYS = {
    "encoder_causal": True,
    "scale_embedding": False,
    "position_embedding_type": "rope",
    "rope_type": "default",
    "ln_type": "LayerNorm",
}

# of the vocoder and its training, of the feature extractor, or read by no implementation
UNREAD_KEYS = (
    "max_audio_seconds",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "decoder_kernel_size",
    "decoder_stride_size",
    "decoder_causal",
    "decoder_attn_window_size",
    "nfft",
    "window_size",
    "vocoder_padding",
    "fmin",
    "fmax",
    "threshold_ema_dead_code",
    "use_istft_only",
    "hybrid_block_size",
)

LAYER_TYPES = ("sliding_attention", "full_attention")
REFERENCE_DTYPES = ("bfloat16", "float32")


@auto_docstring(
    checkpoint="XiaomiMiMo/MiMo-V2.5",
    custom_intro="""
    Configuration of the audio tokenizer inside MiMo-V2.5 and V2.6. Reads the released spelling and the canonical names
    below, and writes the released spelling with every key it was read with.
    """,
)
@strict
class MiMoAudioTokenizerConfig(PreTrainedConfig):
    r"""
    num_mel_bins (`int`, *optional*, defaults to 128):
        Values of a mel frame.
    sampling_rate (`int`, *optional*, defaults to 24000):
        Samples per second of the sound that mel frames are made of.
    hop_length (`int`, *optional*, defaults to 240):
        Samples per mel frame.
    kernel_size (`int`, *optional*, defaults to 3):
        Frames that both convolutions see; an odd number.
    stride_size (`int`, *optional*, defaults to 2):
        Step of the second convolution.
    pooling_size (`int`, *optional*, defaults to 2):
        Positions behind the last layer that become one code frame.
    layer_types (`list[str]`, *optional*):
        `"sliding_attention"` or `"full_attention"` per layer (released: `hybrid_attention`, `swa_per_block`).
    sliding_window (`int`, *optional*, defaults to 128):
        A position of a sliding layer sees this many positions before it, and itself (released: the first of
        `encoder_attn_window_size`).
    skip_layer_id (`int`, *optional*, defaults to 3):
        The output of this layer, counted from 1, is added to that of the last one; None for none.
    num_quantizers (`int`, *optional*, defaults to 20):
        Levels of the residual vector quantizer, which are the `audio_channels` of the language model.
    codebook_size (`list[int]`, *optional*):
        Entries of the codebook of each level.
    rope_theta (`float`, *optional*, defaults to 10000.0):
        Base of the rotary frequencies.
    reference_dtype (`str`, *optional*, defaults to `"bfloat16"`):
        Codebooks and rotary frequencies are rounded to this dtype whatever the dtype of the weights: the publisher's
        code and both servers run the tokenizer in bfloat16, which made the codes that the language model has learned.
        `"float32"` rounds nothing.

    ```python
    >>> from modeling_mimo.processors import MiMoAudioTokenizerConfig

    >>> MiMoAudioTokenizerConfig().layer_types[:2]
    ['sliding_attention', 'full_attention']
    ```
    """

    model_type = "mimo_audio_tokenizer"

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    skip_layer_id: int | None = 3
    num_mel_bins: int = 128
    sampling_rate: int = 24000
    hop_length: int = 240
    kernel_size: int = 3
    stride_size: int = 2
    pooling_size: int = 2
    layer_types: list[str] | None = None
    sliding_window: int = 128
    num_quantizers: int = 20
    codebook_size: list[int] | None = None
    rope_theta: float | int = 10000.0
    reference_dtype: str = "bfloat16"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self._unread = {key: kwargs.pop(key) for key in (*UNREAD_KEYS, *FIXED_KEYS) if key in kwargs}
        for released, canonical in RENAMED_KEYS.items():
            if released in kwargs:
                setattr(self, canonical, kwargs.pop(released))
        window = kwargs.pop("encoder_attn_window_size", None)
        if window is not None:
            if len(window) != 2 or window[0] < 1 or window[1] != 0:
                raise ValueError(f"`encoder_attn_window_size`: expected [positions before, 0], got {window}.")
            self.sliding_window = window[0]
        hybrid, period = kwargs.pop("hybrid_attention", True), kwargs.pop("swa_per_block", 2)
        self._unread |= {"hybrid_attention": hybrid, "swa_per_block": period}
        if self.layer_types is None:
            # the last layer of each period is full
            is_full = [hybrid and i % period == period - 1 for i in range(self.num_hidden_layers)]
            self.layer_types = [LAYER_TYPES[full] for full in is_full]
        if self.codebook_size is None:
            self.codebook_size = ([1024, 1024, 256] + [128] * self.num_quantizers)[: self.num_quantizers]
        super().__post_init__(**kwargs)
        self._validate()

    def _validate(self) -> None:
        """Raises one `ValueError` naming field, expected and got for the first contradiction."""

        def expect(condition: bool, field: str, expected: Any, got: Any) -> None:
            if not condition:
                raise ValueError(f"`{field}`: expected {expected}, got {got!r}.")

        for field, expected in FIXED_KEYS.items():
            got = self._unread.get(field, expected)
            hint = "; the stand-alone MiMo-Audio-Tokenizer does not fit MiMo-V2.5" if field == "encoder_causal" else ""
            expect(got == expected, field, f"{expected!r}{hint}", got)
        for field in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "num_mel_bins",
            "hop_length",
            "sampling_rate",
            "stride_size",
            "pooling_size",
            "sliding_window",
            "num_quantizers",
        ):
            expect(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        heads = self.num_attention_heads
        expect(
            self.hidden_size % (2 * heads) == 0, "hidden_size", f"a multiple of 2 * {heads} heads", self.hidden_size
        )
        expect(self.kernel_size % 2 == 1, "kernel_size", "an odd number", self.kernel_size)
        expect(self.hidden_act in ACT2FN, "hidden_act", "an activation of Transformers", self.hidden_act)
        expect(
            len(self.layer_types) == self.num_hidden_layers and set(self.layer_types) <= set(LAYER_TYPES),
            "layer_types",
            f"{self.num_hidden_layers} names out of {list(LAYER_TYPES)}",
            self.layer_types,
        )
        expect(
            len(self.codebook_size) == self.num_quantizers and min(self.codebook_size) >= 1,
            "codebook_size",
            f"{self.num_quantizers} sizes, one per level",
            self.codebook_size,
        )
        expect(
            self.skip_layer_id is None or 1 <= self.skip_layer_id <= self.num_hidden_layers,
            "skip_layer_id",
            f"a layer of 1 to {self.num_hidden_layers}",
            self.skip_layer_id,
        )
        expect(
            self.reference_dtype in REFERENCE_DTYPES,
            "reference_dtype",
            f"one of {list(REFERENCE_DTYPES)}",
            self.reference_dtype,
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def frames_per_code(self) -> int:
        """Mel frames that one code frame stands for."""
        return self.stride_size * self.pooling_size

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # the released file has no model_type
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path}: expected the folder of an audio tokenizer, got a model of type "
                f'{config_dict["model_type"]!r}; the tokenizer is in it with subfolder="audio_tokenizer".'
            )
        return config_dict, unused

    def to_dict(self) -> dict[str, Any]:
        """The released spelling, where there is one."""
        output = super().to_dict()
        output.pop("_unread", None)
        for released, canonical in RENAMED_KEYS.items():
            if canonical in output:
                output[released] = output.pop(canonical)
        output["encoder_attn_window_size"] = [output.pop("sliding_window"), 0]
        return output | self._unread


__all__ = ["MiMoAudioTokenizerConfig"]
