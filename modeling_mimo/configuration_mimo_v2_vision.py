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
"""Configuration of the vision tower: `vision_config` of the released config.json files, and its spellings."""

from dataclasses import fields
from functools import wraps
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import auto_docstring


BLOCK_CODES = {-1: "full", 0: "row", 1: "column"}
SINK_TYPES = ("first_key", "null_logit")

# released spelling -> canonical name, where only the name differs
RENAMED_KEYS = {
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_chans": "num_channels",
    "qk_channels": "head_dim",
    "visual_token_window_size": "sliding_window",
}

# follow from other fields in the released files; checked where they are given
DERIVED_KEYS = {
    "spatial_patch_size": lambda config: config.patch_size,
    "num_query_groups": lambda config: config.num_attention_heads // config.num_key_value_heads,
    "fullatt_block_indexes": lambda config: [index for index, kind in enumerate(config.block_types) if kind == "full"],
}

# keys of the released files that no implementation reads
UNREAD_KEYS = ("tokens_per_second", "window_size")


def raises_value_errors(cls: type) -> type:
    """Strict dataclasses wrap every complaint in an exception of their own; users catch `ValueError`."""
    strict_init = cls.__init__

    @wraps(strict_init)
    def __init__(self, *args, **kwargs):
        try:
            strict_init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    cls.__init__ = __init__
    return cls


@raises_value_errors
@auto_docstring(
    checkpoint="XiaomiMiMo/MiMo-V2.5",
    custom_intro="""
    Configuration of the vision tower of MiMo-V2.5 and V2.6. Reads the released spelling and the canonical names below,
    and writes the released spelling with every key it was read with.
    """,
)
@strict
class MiMoV2VisionConfig(PreTrainedConfig):
    r"""
    rope_theta (`float`, *optional*, defaults to 10000.0):
        Base of the rotary frequencies of rows and columns.
    block_types (`list[str]`, *optional*):
        Attention per block: `"full"`, or windows over patches in `"row"` or `"column"` order (released:
        `vit_window_attn_types`, -1, 0 or 1).
    sliding_window (`int`, *optional*, defaults to 64):
        A patch of a windowed block sees this many patches on either side, in the current order.
    num_channels (`int`, *optional*, defaults to 3):
        Colour channels of a patch.
    temporal_patch_size (`int`, *optional*, defaults to 2):
        Frames of a patch; a still image is repeated.
    spatial_merge_size (`int`, *optional*, defaults to 2):
        Patches per side of the squares that become one token.
    out_hidden_size (`int`, *optional*, defaults to 4096):
        Width of the language model.
    use_sink (`bool`, *optional*, defaults to `True`):
        Whether windowed blocks have one learned sink per head.
    sink_type (`str`, *optional*, defaults to `"first_key"`):
        `"first_key"` adds the sink to the logit of the first patch of the sequence, as the publisher's modelling code
        and vLLM do; `"null_logit"` makes it one more logit without a value, as SGLang and llama.cpp do.

    ```python
    >>> from modeling_mimo import MiMoV2Config

    >>> MiMoV2Config.from_pretrained("path/to/MiMo-V2.5").vision_config.block_types[:2]
    ['full', 'row']
    ```
    """

    model_type = "mimo_v2_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1280
    intermediate_size: int = 4608
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 4096
    block_types: list[str] | None = None
    sliding_window: int = 64
    use_sink: bool = True
    sink_type: str = "first_key"
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 10000.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self._unread = {key: kwargs.pop(key) for key in UNREAD_KEYS if key in kwargs}
        for released, canonical in RENAMED_KEYS.items():
            if released in kwargs:
                value, default = kwargs.pop(released), type(self).__dataclass_fields__[canonical].default
                if getattr(self, canonical) not in (default, value):
                    raise ValueError(
                        f"`vision_config.{released}`: expected {canonical}={getattr(self, canonical)}, got {value!r}."
                    )
                setattr(self, canonical, value)
        codes = kwargs.pop("vit_window_attn_types", None)
        derived = {key: kwargs.pop(key) for key in DERIVED_KEYS if key in kwargs}
        self.block_types = self._read_block_types(codes)
        super().__post_init__(**kwargs)
        self._validate(derived)

    def _read_block_types(self, codes: list[int] | None) -> list[str]:
        """One name per block, from the released codes, the canonical field, or V2.5's rule."""
        if codes is not None:
            unknown = [code for code in codes if code not in BLOCK_CODES]
            if unknown:
                raise ValueError(
                    f"`vision_config.vit_window_attn_types`: expected codes out of {list(BLOCK_CODES)}, "
                    f"got {unknown[0]!r}."
                )
            return [BLOCK_CODES[code] for code in codes]
        if self.block_types is not None:
            return self.block_types
        # a full block at every ninth place; between two of them four row and four column blocks
        return [BLOCK_CODES[-1 if i % 9 == 0 else int(i % 9 > 4)] for i in range(self.num_hidden_layers)]

    def _validate(self, derived: dict[str, Any]) -> None:
        """Raises one `ValueError` naming field, expected and got for the first contradiction."""

        def expect(condition: bool, field: str, expected: Any, got: Any) -> None:
            if not condition:
                raise ValueError(f"`vision_config.{field}`: expected {expected}, got {got!r}.")

        for field in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "num_channels",
            "patch_size",
            "temporal_patch_size",
            "spatial_merge_size",
            "out_hidden_size",
            "sliding_window",
        ):
            expect(getattr(self, field) >= 1, field, "at least 1", getattr(self, field))
        expect(
            len(self.block_types) == self.num_hidden_layers and set(self.block_types) <= set(BLOCK_CODES.values()),
            "block_types",
            f"{self.num_hidden_layers} names out of {list(BLOCK_CODES.values())}",
            self.block_types,
        )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        expect(heads % kv_heads == 0, "num_attention_heads", f"a multiple of num_key_value_heads={kv_heads}", heads)
        # half of a head turns with the row and half with the column, each in pairs
        expect(self.head_dim >= 4 and self.head_dim % 4 == 0, "head_dim", "a multiple of 4", self.head_dim)
        expect(self.sink_type in SINK_TYPES, "sink_type", f"one of {list(SINK_TYPES)}", self.sink_type)
        expect(self.hidden_act in ACT2FN, "hidden_act", "an activation of Transformers", self.hidden_act)
        for field, got in derived.items():
            expected = DERIVED_KEYS[field](self)
            expect(got == expected, field, expected, got)

    def to_dict(self) -> dict[str, Any]:
        """The tower's own fields, in the released spelling; what loading adds (dtype, ...) is the whole model's."""
        values = super().to_dict()
        own = {field.name for field in fields(self)} - {field.name for field in fields(PreTrainedConfig)}
        # the base class expects the version in every nested dictionary, and takes it out
        own |= {"model_type", "transformers_version"}
        output = {name: value for name, value in values.items() if name in own}
        codes = {name: code for code, name in BLOCK_CODES.items()}
        output["vit_window_attn_types"] = [codes[name] for name in output.pop("block_types")]
        for released, canonical in RENAMED_KEYS.items():
            output[released] = output.pop(canonical)
        output |= {key: rule(self) for key, rule in DERIVED_KEYS.items()}
        return output | self._unread


__all__ = ["MiMoV2VisionConfig"]
