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
"""Configuration of the MiMo-V2 family: the only place that knows the spellings of the released config.json files."""

import copy
from typing import Any, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import auto_docstring

from .configuration_mimo_v2_audio import MiMoV2AudioConfig
from .configuration_mimo_v2_vision import MiMoV2VisionConfig, raises_value_errors


ATTENTION_LAYER_CODES = {0: "full_attention", 1: "sliding_attention"}
MLP_LAYER_CODES = {0: "dense", 1: "sparse"}

# released spelling -> canonical name, where only the name differs
RENAMED_KEYS = {"layernorm_epsilon": "rms_norm_eps", "num_nextn_predict_layers": "num_mtp_layers"}

# one value is released for each of these; another value means another architecture
FIXED_KEYS = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "n_shared_experts": (None, 0)}

# keys of the released files that no implementation reads: written again on save, never exposed
UNREAD_KEYS = ("attention_chunk_size", "hybrid_block_size", "vision_model_type")

# ids that the released files have in their `processor_config` alone
AUDIO_TOKEN_IDS = ("audio_token_id", "audio_start_token_id", "audio_end_token_id")

# any of these keys marks the released spelling
RELEASED_MARKS = ("hybrid_layer_pattern", "moe_layer_freq", "layernorm_epsilon", "swa_rope_theta")

POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "v_head_dim",
    "swa_num_attention_heads",
    "swa_num_key_value_heads",
    "swa_head_dim",
    "swa_v_head_dim",
    "sliding_window",
    "max_position_embeddings",
)

# Layers, tables and modules are made per unit of these, so a size is checked before anything is made of it. Far above
# every release: 70 layers, 26,496 routed experts over all of them, 3 draft heads.
LARGEST = {
    "num_hidden_layers": 1024,
    "num_mtp_layers": 64,
    "num_nextn_predict_layers": 64,
    "depth": 1024,
    "input_local_layers": 1024,
    "audio_channels": 1024,
}
LARGEST_SIZE = 2**31
MOST_EXPERTS = 2**17

# not infinity, not NaN, and not an int that no float can hold
FINITE = 1e300
FINITE_FIELDS = (
    "attention_value_scale",
    "attention_dropout",
    "routed_scaling_factor",
    "rms_norm_eps",
    "initializer_range",
)

# `quant_method` of the released files, and the name our quantizer is registered under
RELEASED_QUANT_METHOD = "fp8"
QUANT_METHOD = "mimo_v2_fp8"
# bits -> name in the folder of a model that was quantized with bitsandbytes
BNB_METHODS = {4: "mimo_v2_bitsandbytes_4bit", 8: "mimo_v2_bitsandbytes_8bit"}

# V2-Flash: same decoder with split projections, rope thetas 5e6 / 1e4 and twice the KV heads in sliding layers
FLASH_MODEL_TYPE = "mimo_v2_flash"
FLASH_ARCHITECTURES = ["MiMoV2FlashForCausalLM"]


class AttentionGeometry(NamedTuple):
    """Shape facts of one attention layer type.

    `window` is the number of keys a query sees, itself included; None means all of them.
    `qkv_chunks` is the number of `[Q | K | V]` row chunks in a fused projection.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None
    has_sinks: bool
    qkv_chunks: int

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the query, key and value projections."""
        return (
            self.num_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
            self.num_key_value_heads * self.v_head_dim,
        )


def _refuse_large(values: dict[str, Any], prefix: str = "") -> None:
    """ValueError for a number that is too large to make layers or tables from."""
    for field, value in values.items():
        largest = LARGEST.get(field, LARGEST_SIZE)
        if isinstance(value, int) and value > largest:
            raise ValueError(f"`{prefix}{field}`: expected at most {largest}, got {str(value)[:40]}.")


def _decode_pattern(field: str, codes: list, names: dict[int, str], num_hidden_layers: int) -> list[str]:
    if not isinstance(codes, (list, tuple)) or len(codes) != num_hidden_layers:
        got = f"{len(codes)} entries" if isinstance(codes, (list, tuple)) else repr(codes)
        raise ValueError(f"`{field}`: expected a list of num_hidden_layers={num_hidden_layers} codes, got {got}.")
    for index, code in enumerate(codes):
        if not isinstance(code, (int, str)) or code not in names:
            raise ValueError(f"`{field}[{index}]`: expected one of {sorted(names)}, got {code!r}.")
    return [names[code] for code in codes]


@raises_value_errors
@auto_docstring(
    checkpoint="XiaomiMiMo/MiMo-V2.5",
    custom_intro="""
    Configuration of MiMo-V2.5, V2.5-Pro, V2.6 and V2-Flash. Reads the released `config.json` files as well as the
    canonical names below, and always writes the released spelling back, with every key it was read with, so that
    other engines load what it saves. Contradictory fields raise a `ValueError` that names field, expected and got.
    """,
)
@strict
class MiMoV2Config(PreTrainedConfig):
    r"""
    layer_types (`list[str]`, *optional*):
        `"full_attention"` or `"sliding_attention"` per layer (released: `hybrid_layer_pattern`, 0 or 1).
    mlp_layer_types (`list[str]`, *optional*):
        `"dense"` or `"sparse"` per layer (released: `moe_layer_freq`, 0 or 1).
    swa_num_attention_heads (`int`, *optional*):
        Query heads of the sliding layers; those of the global layers if left out.
    swa_num_key_value_heads (`int`, *optional*):
        KV heads of the sliding layers; twice those of the global layers if left out.
    swa_head_dim (`int`, *optional*):
        Width of queries and keys in the sliding layers; that of the global layers if left out.
    swa_v_head_dim (`int`, *optional*):
        Width of values in the sliding layers; that of the global layers if left out.
    sliding_window (`int`, *optional*, defaults to 128):
        Number of keys a query of a sliding layer sees, itself included.
    sliding_window_includes_query (`bool`, *optional*, defaults to `True`):
        How a released `sliding_window_size` N is read. `True`: N keys in all, as the publisher's modelling code and
        vLLM do. `False`: N keys before the query, hence N + 1 in all, as SGLang and Transformers' `mimo_v2_flash`
        do; needed to reproduce those two numerically.
    attention_value_scale (`float`, *optional*, defaults to 0.707):
        Multiplies the values before they are cached. Never guessed for a released file: it must be there.
    attention_projection_layout (`str`, *optional*):
        `"fused_qkv"` (one `qkv_proj`) or `"split"` (`q_proj`, `k_proj`, `v_proj`, the default of V2-Flash).
    fused_qkv_layout (`str`, *optional*):
        Row order of a fused projection: `"chunked"` (released: one `[Q | K | V]` chunk per global KV head) or
        `"plain"` (`[Q; K; V]`, as re-exporters write it). `None`: detected from the files, and where their shapes do
        not decide, `"chunked"`.
    add_swa_attention_sink_bias (`bool`, *optional*, defaults to `True`):
        Whether sliding layers have one learned sink logit per head.
    add_full_attention_sink_bias (`bool`, *optional*, defaults to `False`):
        Whether global layers have one too; in no release.
    n_group (`int`, *optional*, defaults to 1):
        Groups of experts the router chooses among first; 1 in every release, which means no groups.
    moe_router_dtype (`str`, *optional*, defaults to `"float32"`):
        Dtype of the router's matrix product: `"float32"`, or `"bfloat16"` for V2.6.
    num_mtp_layers (`int`, *optional*, defaults to 3):
        Multi-token-prediction layers in the checkpoint (released: `num_nextn_predict_layers`, or nothing). Where
        nothing is said, files with fewer of them are as good.
    load_mtp (`bool`, *optional*, defaults to `True`):
        `False` leaves these layers out of the model.
    mtp_loss_weight (`float`, *optional*, defaults to 0.0):
        With `labels`, the weight of the sum of the losses of these layers beside the loss of the trunk.
    vision_config (`MiMoV2VisionConfig` or `dict`, *optional*):
        The vision tower; a text-only model without it.
    audio_config (`MiMoV2AudioConfig` or `dict`, *optional*):
        The audio encoder; a model that cannot hear without it.
    load_towers (`bool`, *optional*, defaults to `True`):
        `False` leaves vision tower and audio encoder out of the model, which then answers text only and refuses media.
    audio_token_id (`int`, *optional*):
        Id of the placeholder `<|audio_pad|>`; like the two below taken from `processor_config` where it is only there.
    audio_start_token_id (`int`, *optional*):
        Id of `<|mimo_audio_start|>`.
    audio_end_token_id (`int`, *optional*):
        Id of `<|mimo_audio_end|>`.
    processor_config (`dict`, *optional*):
        Media settings of the released file, for the processors.

    ```python
    >>> from modeling_mimo import MiMoV2Config

    >>> MiMoV2Config().attention_geometry("sliding_attention").qkv_sizes
    (12288, 1536, 1024)
    ```
    """

    model_type = "mimo_v2"
    sub_configs = {"vision_config": MiMoV2VisionConfig, "audio_config": MiMoV2AudioConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"}
    ignore_keys_at_rope_validation = {"partial_rotary_factor", "type"}

    # vision tower and audio encoder stay whole on every rank: 2 GB, which collectives would slow down; so does eh_proj
    base_model_tp_plan = {
        f"{layer}.{name}": style
        for layer in ("layers.*", "mtp.layers.*")
        for name, style in {
            "self_attn.qkv_proj": "colwise",
            "self_attn.q_proj": "colwise",
            "self_attn.k_proj": "colwise",
            "self_attn.v_proj": "colwise",
            "self_attn.attention_sink_bias": "colwise",
            "self_attn.o_proj": "rowwise",
            "mlp.gate_proj": "colwise",
            "mlp.up_proj": "colwise",
            "mlp.down_proj": "rowwise",
        }.items()
    } | {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "mtp.layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 152576
    hidden_size: int = 4096
    intermediate_size: int = 16384
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 48
    num_attention_heads: int = 64
    num_key_value_heads: int = 4
    head_dim: int = 192
    v_head_dim: int = 128
    swa_num_attention_heads: int | None = None
    swa_num_key_value_heads: int | None = None
    swa_head_dim: int | None = None
    swa_v_head_dim: int | None = None
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    sliding_window: int = 128
    sliding_window_includes_query: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_value_scale: float | int | None = None
    attention_projection_layout: str | None = None
    fused_qkv_layout: str | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    add_swa_attention_sink_bias: bool = True
    add_full_attention_sink_bias: bool = False
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int | None = None
    moe_router_dtype: str | None = None
    output_router_logits: bool = False
    num_mtp_layers: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    max_position_embeddings: int = 1048576
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    audio_token_id: int | None = None
    audio_start_token_id: int | None = None
    audio_end_token_id: int | None = None
    vision_config: MiMoV2VisionConfig | dict[str, Any] | None = None
    audio_config: MiMoV2AudioConfig | dict[str, Any] | None = None
    processor_config: dict[str, Any] | None = None
    load_towers: bool = True
    load_mtp: bool = True
    mtp_loss_weight: float = 0.0

    def __post_init__(self, **kwargs):
        self._source, self._as_read = None, None
        for key in UNREAD_KEYS:
            kwargs.pop(key, None)
        for key, expected in FIXED_KEYS.items():
            if (got := kwargs.pop(key, expected[0])) not in expected:
                raise ValueError(f"`{key}`: expected one of {list(expected)}, the released architecture, got {got!r}.")
        self._check_sizes(kwargs)
        if any(key in kwargs for key in RELEASED_MARKS):
            self._read_released_keys(kwargs)
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, (str, int, list)):
            raise ValueError(f"`quantization_config`: expected a dictionary or nothing, got {quantization!r}.")
        if isinstance(self.vision_config, dict):
            self.vision_config = MiMoV2VisionConfig(**self.vision_config)
        if isinstance(self.audio_config, dict):
            self.audio_config = MiMoV2AudioConfig(**self.audio_config)
        self._fill_defaults(kwargs.get("model_type", self.model_type) == FLASH_MODEL_TYPE)
        super().__post_init__(**kwargs)
        # CODEPATH: every FP8 release (V2.5, V2.5-Pro, V2-Flash, V2.6) says "fp8"; bf16 re-exports have no entry
        if isinstance(quantization, dict) and quantization.get("quant_method") == RELEASED_QUANT_METHOD:
            self.quantization_config = {**quantization, "quant_method": QUANT_METHOD}

    def _check_sizes(self, released: dict[str, Any]) -> None:
        own = {field: getattr(self, field) for field in (*POSITIVE_FIELDS, "n_routed_experts", "num_mtp_layers")}
        _refuse_large({**own, **{field: value for field, value in released.items() if field in LARGEST}})
        if (experts := self.num_hidden_layers * self.n_routed_experts) > MOST_EXPERTS:
            raise ValueError(f"`n_routed_experts`: expected at most {MOST_EXPERTS} over all layers, got {experts}.")
        for part in ("vision_config", "audio_config"):
            if isinstance(values := getattr(self, part), dict):
                _refuse_large(values, f"{part}.")

    def _read_released_keys(self, kwargs: dict[str, Any]) -> None:
        """Moves the released spellings out of `kwargs` into the canonical fields."""
        for field, names, target in (
            ("hybrid_layer_pattern", ATTENTION_LAYER_CODES, "layer_types"),
            ("moe_layer_freq", MLP_LAYER_CODES, "mlp_layer_types"),
        ):
            if field not in kwargs:
                raise ValueError(f"`{field}`: expected one code per layer in a released config.json, got nothing.")
            setattr(self, target, _decode_pattern(field, kwargs.pop(field), names, self.num_hidden_layers))
        for released, canonical in RENAMED_KEYS.items():
            if (value := kwargs.pop(released, None)) is not None:
                setattr(self, canonical, value)
        if (window := kwargs.pop("sliding_window_size", self.sliding_window)) != self.sliding_window:
            raise ValueError(
                f"`sliding_window_size`: expected the value of sliding_window={self.sliding_window}, got {window!r}."
            )
        if not self.sliding_window_includes_query:
            self.sliding_window += 1
        self._read_released_rope(kwargs)
        if self.attention_value_scale is None:
            raise ValueError("`attention_value_scale`: expected a number in a released config.json, got nothing.")

    def _read_released_rope(self, kwargs: dict[str, Any]) -> None:
        """`rope_theta`, `swa_rope_theta`, `partial_rotary_factor` -> one rope dictionary per layer type."""
        # CODEPATH: V2.6 has a flat `rope_parameters`, V2.5 a `rope_scaling`; both only repeat the default rope type
        scaling = kwargs.pop("rope_scaling", None)
        if scaling is not None and not isinstance(scaling, dict):
            raise ValueError(f"`rope_scaling`: expected a dictionary or nothing, got {scaling!r}.")
        flat = {**(scaling or {}), **(self.rope_parameters or {})}
        thetas = {
            "full_attention": kwargs.pop("rope_theta", flat.get("rope_theta")),
            "sliding_attention": kwargs.pop("swa_rope_theta", None),
        }
        factor = kwargs.pop("partial_rotary_factor", flat.get("partial_rotary_factor"))
        for field, value in (
            ("rope_theta", thetas["full_attention"]),
            ("swa_rope_theta", thetas["sliding_attention"]),
            ("partial_rotary_factor", factor),
        ):
            if value is None:
                raise ValueError(f"`{field}`: expected a number in a released config.json, got nothing.")
        self.rope_parameters = {
            layer_type: {
                "rope_type": flat.get("rope_type", "default"),
                "rope_theta": theta,
                "partial_rotary_factor": factor,
            }
            for layer_type, theta in thetas.items()
        }

    def _fill_defaults(self, is_flash: bool) -> None:
        """Fills what was left at `None`; the patterns default to V2.5's rule (global at 0, 5, 11, 17, ...)."""
        n_layers = self.num_hidden_layers
        if self.layer_types is None:
            self.layer_types = [ATTENTION_LAYER_CODES[int(i != 0 and (i + 1) % 6 != 0)] for i in range(n_layers)]
            # the last layer of every release is global
            self.layer_types[-1] = ATTENTION_LAYER_CODES[0]
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["dense"] + ["sparse"] * (n_layers - 1)
        if self.rope_parameters is None:
            self.rope_parameters = {
                "full_attention": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.334},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334},
            }
        # a released file that says nothing has three, other files may have fewer; see `take_mtp_layers_from_files`
        self._assumes_mtp_layers = self.num_mtp_layers is None
        if self._assumes_mtp_layers:
            self.num_mtp_layers = 3
        if self.swa_num_key_value_heads is None:
            # as in V2.5 and V2-Flash; Transformers' V2-Flash config has no key for it
            self.swa_num_key_value_heads = self.num_key_value_heads * 2
        for field in ("num_attention_heads", "head_dim", "v_head_dim"):
            if getattr(self, f"swa_{field}") is None:
                setattr(self, f"swa_{field}", getattr(self, field))
        if self.attention_projection_layout is None:
            # CODEPATH: V2.5, V2.5-Pro and V2.6 say "fused_qkv"; V2-Flash says nothing and has split projections
            self.attention_projection_layout = "split" if is_flash else "fused_qkv"
        if self.attention_value_scale is None:
            self.attention_value_scale = 0.707
        for name in AUDIO_TOKEN_IDS:
            if getattr(self, name) is None and self.processor_config is not None:
                setattr(self, name, self.processor_config.get(name))
        # released null means "leave the router weights as they are", and "no entry" means float32
        self.routed_scaling_factor = 1.0 if self.routed_scaling_factor is None else self.routed_scaling_factor
        self.moe_router_dtype = self.moe_router_dtype or "float32"

    def validate_consistency(self) -> None:
        """Raises one `ValueError` naming field, expected and got for the first contradiction found."""
        for field, names in (("layer_types", ATTENTION_LAYER_CODES), ("mlp_layer_types", MLP_LAYER_CODES)):
            values = getattr(self, field)
            _decode_pattern(field, values, {name: name for name in names.values()}, self.num_hidden_layers)
        for name, choices in (
            ("attention_projection_layout", ("fused_qkv", "split")),
            ("fused_qkv_layout", (None, "chunked", "plain")),
            ("moe_router_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}`: expected one of {choices}, got {getattr(self, name)!r}.")
        for name in POSITIVE_FIELDS:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}`: expected at least 1, got {getattr(self, name)}.")
        if self.mtp_loss_weight < 0:
            raise ValueError(f"`mtp_loss_weight`: expected at least 0, got {self.mtp_loss_weight}.")
        for name in FINITE_FIELDS:
            if not abs(getattr(self, name)) < FINITE:
                raise ValueError(f"`{name}`: expected a finite number, got {getattr(self, name)}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act`: expected an activation of Transformers, got {self.hidden_act!r}.")
        for layer_type in ATTENTION_LAYER_CODES.values():
            self._validate_attention(layer_type)
            self._validate_rope(layer_type)
        self._validate_routing()
        for name, placeholders in (
            ("vision_config", ("image_token_id", "video_token_id")),
            ("audio_config", ("audio_token_id",)),
        ):
            if getattr(self, name) is not None:
                self._validate_part(name, placeholders)

    def _validate_part(self, name: str, placeholders: tuple[str, ...]) -> None:
        if (width := getattr(self, name).out_hidden_size) != self.hidden_size:
            raise ValueError(f"`{name}.out_hidden_size`: expected hidden_size={self.hidden_size}, got {width}.")
        for token_id in placeholders:
            if getattr(self, token_id) is None:
                raise ValueError(f"`{token_id}`: expected the id of a placeholder beside {name}, got nothing.")

    def _validate_routing(self) -> None:
        if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"`num_experts_per_tok`: expected 1 to n_routed_experts={self.n_routed_experts}, "
                f"got {self.num_experts_per_tok}."
            )
        if self.n_group < 1 or self.n_routed_experts % self.n_group or not 0 < self.topk_group <= self.n_group:
            raise ValueError(
                f"`n_group`: expected a divisor of n_routed_experts={self.n_routed_experts} that is at least "
                f"topk_group={self.topk_group}, got {self.n_group}."
            )
        if self.num_experts_per_tok > (eligible := self.n_routed_experts // self.n_group * self.topk_group):
            raise ValueError(
                f"`num_experts_per_tok`: expected at most the {eligible} experts of topk_group={self.topk_group} "
                f"groups, got {self.num_experts_per_tok}."
            )

    def _validate_attention(self, layer_type: str) -> None:
        geometry, prefix = self.attention_geometry(layer_type), "swa_" if layer_type == "sliding_attention" else ""
        if geometry.num_key_value_heads < 1 or geometry.num_heads % geometry.num_key_value_heads:
            raise ValueError(
                f"`{prefix}num_attention_heads`: expected a multiple of {prefix}num_key_value_heads="
                f"{geometry.num_key_value_heads}, got {geometry.num_heads}."
            )
        if self.attention_projection_layout == "fused_qkv" and (
            geometry.num_heads % geometry.qkv_chunks or geometry.num_key_value_heads % geometry.qkv_chunks
        ):
            raise ValueError(
                f"`{prefix}num_key_value_heads`: expected a multiple of the {geometry.qkv_chunks} chunks of a fused "
                f"projection (num_key_value_heads), got {geometry.num_key_value_heads}."
            )

    def _validate_rope(self, layer_type: str) -> None:
        rope = self.rope_parameters.get(layer_type) if isinstance(self.rope_parameters, dict) else None
        rope = rope if isinstance(rope, dict) else {}
        for key, kinds in (("rope_type", str), ("rope_theta", (int, float)), ("partial_rotary_factor", (int, float))):
            if not isinstance(rope.get(key), kinds):
                expected, got = "string" if kinds is str else "number", repr(rope[key]) if key in rope else "nothing"
                raise ValueError(f"`rope_parameters['{layer_type}']['{key}']`: expected a {expected}, got {got}.")
            if kinds is not str and not abs(rope[key]) < FINITE:
                raise ValueError(
                    f"`rope_parameters['{layer_type}']['{key}']`: expected a finite number, got {rope[key]}."
                )
        if rope["rope_type"] != "default":
            raise ValueError(
                f"`rope_parameters['{layer_type}']['rope_type']`: expected 'default', the only released type, "
                f"got {rope['rope_type']!r}."
            )
        head_dim = self.attention_geometry(layer_type).head_dim
        rotary_dim = int(head_dim * rope["partial_rotary_factor"])
        if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
            raise ValueError(
                f"`partial_rotary_factor`: expected an even number of rotary dims, at least 2 and at most the "
                f"head_dim={head_dim} of {layer_type}, got {rotary_dim}."
            )

    def convert_rope_params_to_dict(self, **kwargs):
        # ours are nested per layer type already; the base class would write a flat theta beside them
        return kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # the switch decides how the file's window is read, so it joins the file; other overrides come after it
        if (switch := kwargs.pop("sliding_window_includes_query", None)) is not None:
            config_dict = {**config_dict, "sliding_window_includes_query": switch}
        try:
            source = copy.deepcopy(config_dict)
            as_read = super().from_dict(copy.deepcopy(config_dict))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
            # a field of a file may hold anything: what strict types let through stops at its first use
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise ValueError(f"config.json: expected fields of the released kinds, got {problem}.") from error
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.validate_consistency()
        if "num_mtp_layers" in kwargs:
            config._assumes_mtp_layers = False
        if any(key in source for key in RELEASED_MARKS):
            config._source, config._as_read = source, as_read.to_dict()
        return result

    def to_dict(self) -> dict[str, Any]:
        """The configuration in the released spelling; a value read from a file and unchanged is written as it was."""
        output = super().to_dict()
        source, as_read = output.pop("_source", None), output.pop("_as_read", None)
        output.pop("_assumes_mtp_layers", None)
        output["model_type"] = self.model_type
        output = self._write_released_keys(output)
        if source is None:
            return {key: value for key, value in output.items() if value is not None}
        for key, value in list(output.items()):
            if key != "transformers_version" and as_read.get(key) == value:
                if key in source:
                    output[key] = source[key]
                else:
                    del output[key]
        dropped = {"quantization_config"} - output.keys()
        if "torch_dtype" in source:
            output["torch_dtype"] = output.pop("dtype", source["torch_dtype"])
        return {key: value for key, value in {**source, **output}.items() if key not in dropped}

    def to_diff_dict(self) -> dict[str, Any]:
        # the base class writes the quantization entry over what `to_dict` says; ours is already the shortest form
        written = self.to_dict()
        diff = super().to_diff_dict()
        return {key: written[key] for key in sorted(diff.keys() | set(self._source or ())) if key in written}

    def _write_released_keys(self, output: dict[str, Any]) -> dict[str, Any]:
        attention_codes = {name: code for code, name in ATTENTION_LAYER_CODES.items()}
        mlp_codes = {name: code for code, name in MLP_LAYER_CODES.items()}
        rope = output.pop("rope_parameters")
        output["hybrid_layer_pattern"] = [attention_codes[name] for name in output.pop("layer_types")]
        output["moe_layer_freq"] = [mlp_codes[name] for name in output.pop("mlp_layer_types")]
        for released, canonical in RENAMED_KEYS.items():
            output[released] = output.pop(canonical)
        window = self.sliding_window - (0 if self.sliding_window_includes_query else 1)
        output["sliding_window"] = output["sliding_window_size"] = window
        output["rope_theta"] = rope["full_attention"]["rope_theta"]
        output["swa_rope_theta"] = rope["sliding_attention"]["rope_theta"]
        output["partial_rotary_factor"] = rope["full_attention"]["partial_rotary_factor"]
        output.update({key: values[0] for key, values in FIXED_KEYS.items()})
        # CODEPATH: V2-Flash files name a class of their own; engines choose their code by it
        if self.model_type == FLASH_MODEL_TYPE and output.get("architectures"):
            output["architectures"] = FLASH_ARCHITECTURES
        quantization = output.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
            output["quantization_config"] = {**quantization, "quant_method": RELEASED_QUANT_METHOD}
        return output

    def attention_geometry(self, layer_type: str) -> AttentionGeometry:
        """Heads, dims, window and sinks of `"full_attention"` or `"sliding_attention"` layers."""
        if layer_type == "sliding_attention":
            return AttentionGeometry(
                self.swa_num_attention_heads,
                self.swa_num_key_value_heads,
                self.swa_head_dim,
                self.swa_v_head_dim,
                self.sliding_window,
                self.add_swa_attention_sink_bias,
                self.num_key_value_heads,
            )
        return AttentionGeometry(
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.v_head_dim,
            None,
            self.add_full_attention_sink_bias,
            self.num_key_value_heads,
        )


__all__ = ["AttentionGeometry", "MiMoV2Config"]
