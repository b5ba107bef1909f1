"""Tensor, expert and data parallelism through Transformers' plans: which degrees a model has, what is refused."""

import math

from torch import nn
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as wildcard
from transformers.utils import logging

from .configuration_mimo_v2 import QUANT_METHOD, MiMoV2Config
from .weight_mapping_mimo_v2 import FP8_BLOCK, MXFP4_GROUP


logger = logging.get_logger(__name__)


def divisors(number: int) -> list[int]:
    return [degree for degree in range(1, number + 1) if number % degree == 0]


def attention_degrees(config: MiMoV2Config) -> list[int]:
    """Numbers of ranks that attention can be shared out to: whole QKV chunks, or whole KV heads, for every layer.

    V2.5 has 4 chunks in global and in sliding layers, though 4 and 8 KV heads.
    """
    geometries = [config.attention_geometry(layer_type) for layer_type in ("full_attention", "sliding_attention")]
    # CODEPATH: V2.5, V2.5-Pro and V2.6 are fused, V2-Flash is split
    if config.attention_projection_layout == "fused_qkv":
        return divisors(math.gcd(*[geometry.qkv_chunks for geometry in geometries]))
    return divisors(math.gcd(*[geometry.num_key_value_heads for geometry in geometries]))


def replicated_attention(config: MiMoV2Config) -> dict[str, str]:
    """`tp_plan` entries that keep attention whole on every rank, for more ranks than `attention_degrees` allows.

    ```python
    >>> plan = replicated_attention(AutoConfig.from_pretrained(path))
    >>> DistributedConfig(tp_size=8, ep_size=8, tp_plan=plan)
    ```
    """
    layers = ["model.layers.*"]
    # CODEPATH: three in every release, none in some re-exports
    if config.num_mtp_layers > 0 and config.load_mtp:
        layers.append("model.mtp.layers.*")
    # CODEPATH: V2.5, V2.5-Pro and V2.6 are fused, V2-Flash is split
    fused = config.attention_projection_layout == "fused_qkv"
    names = ["o_proj", *(["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"])]
    if any(config.attention_geometry(layer_type).has_sinks for layer_type in config.layer_types):
        names.append("attention_sink_bias")
    return {f"{layer}.self_attn.{name}": "replicate" for layer in layers for name in names}


def check_degrees(config: MiMoV2Config, degrees: DistributedConfig, tp_plan: dict[str, str]) -> None:
    """Raises a one-line `ValueError` naming the possible degrees if `degrees` do not fit the model.

    Args:
        tp_plan: what becomes of each module, full names with `*` for layer numbers.
    """
    if "colwise" in [style for name, style in tp_plan.items() if name.endswith(("qkv_proj", "k_proj"))]:
        possible = attention_degrees(config)
        if degrees.tp_size not in possible:
            raise ValueError(
                f"`tp_size`: expected one of {possible}, which leave every rank whole QKV chunks, got "
                f"{degrees.tp_size}; for more ranks share out the experts: ep_size={degrees.tp_size} with "
                "tp_plan=replicated_attention(config) of modeling_mimo.parallel_mimo_v2."
            )
    if config.n_routed_experts % degrees.ep_size:
        raise ValueError(
            f"`ep_size`: expected one of {divisors(config.n_routed_experts)}, which divide the "
            f"{config.n_routed_experts} experts, got {degrees.ep_size}."
        )
    widths = {"intermediate_size": config.intermediate_size}
    if degrees.ep_size == 1:
        widths["moe_intermediate_size"] = config.moe_intermediate_size
    for name, width in widths.items():
        if width % degrees.tp_size:
            raise ValueError(f"`tp_size`: expected a divisor of {name}={width}, got {degrees.tp_size}.")


def check_quantization(model: nn.Module, degrees: DistributedConfig) -> None:
    """Raises a one-line `ValueError` for weights whose storage cannot be shared out, naming what can."""
    method = vars(model).get("quantization_method")
    if method not in (None, QUANT_METHOD):
        raise ValueError(
            f"`quantization_config`: expected none or MiMoV2FP8Config beside distributed_config, got {method}, whose "
            "packed weights cannot be shared out: use device_map without distributed_config, or MiMoV2FP8Config."
        )
    names = [name for name, _ in model.named_parameters()]
    if degrees.dp_size > 1 and any(name.endswith(("_scale_inv", "_scale")) for name in names):
        raise ValueError(
            "`dequantize`: expected True with fsdp_size, whose shares of a weight cut scale blocks, got False: pass "
            "MiMoV2FP8Config(dequantize=True)."
        )
    width = model.config.moe_intermediate_size
    for suffix, block in (("_scale_inv", FP8_BLOCK), ("_scale", MXFP4_GROUP)):
        quantized = any(name.endswith(f"mlp.experts.down_proj{suffix}") for name in names)
        if quantized and degrees.ep_size == 1 and width % (degrees.tp_size * block):
            raise ValueError(
                f"`tp_size`: expected whole blocks of {block} in each share of moe_intermediate_size={width}, got "
                f"{degrees.tp_size}: share out whole experts with ep_size={degrees.tp_size}, or pass "
                "MiMoV2FP8Config(dequantize=True)."
            )


def dequantize_uneven(model: nn.Module, tp_size: int, tp_plan: dict[str, str]) -> None:
    """Leaves unquantized, so that loading dequantizes them, the FP8 layers whose shares would cut scale blocks.

    Of the releases, that concerns the key projections of V2-Flash's global layers: 768 rows, 192 for each of 4 ranks.
    """
    uneven = set()
    for name, module in list(model.named_modules()):
        width = {"colwise": "out_features", "rowwise": "in_features"}.get(tp_plan.get(wildcard(name)))
        # scale blocks of a fused projection are counted in its chunks, of which a rank has whole ones
        if width is None or name.endswith("qkv_proj") or "weight_scale_inv" not in dict(module.named_parameters()):
            continue
        if getattr(module, width) % (tp_size * FP8_BLOCK):
            plain = nn.Linear(module.in_features, module.out_features, False, "meta", model.dtype)
            model.set_submodule(name, plain)
            uneven.add(wildcard(name))
    if uneven:
        logger.warning_once(
            f"Dequantized, since a share of 1/{tp_size} cuts scale blocks: {', '.join(sorted(uneven))}."
        )


class MiMoV2ParallelMixin:
    """Checks in front of what `from_pretrained(distributed_config=...)` does; no weight has been read by then."""

    def init_parallel_plans(self) -> None:
        """As in Transformers, without the rules for what this model does not have, which it would warn about."""
        super().init_parallel_plans()
        names = {wildcard(name) for part in (self.named_modules(), self.named_parameters()) for name, _ in part}
        self._tp_plan, self._ep_plan, self._fsdp_plan = (
            {name: style for name, style in plan.items() if name in names}
            for plan in (self._tp_plan, self._ep_plan, self._fsdp_plan)
        )

    @classmethod
    def prepare_distribute_model(cls, distributed_config: DistributedConfig | dict | None, device_map=None):
        if isinstance(distributed_config, dict):
            distributed_config = DistributedConfig.from_dict(distributed_config)
        if distributed_config is not None and distributed_config.pp_size > 1:
            raise NotImplementedError(
                f"`pp_size`: expected 1, got {distributed_config.pp_size}: Transformers' stages have neither media "
                "nor MTP heads; use tp_size and ep_size, or device_map without distributed_config."
            )
        if distributed_config is not None and device_map is not None:
            raise ValueError(
                f"`device_map`: expected none beside distributed_config, got {device_map!r}: every rank has one "
                "device; for offloading to the CPU or a disk, run one process without distributed_config."
            )
        return super().prepare_distribute_model(distributed_config, device_map)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config: DistributedConfig | None, mesh_manager):
        if mesh_manager is not None:
            override = distributed_config.tp_plan if isinstance(distributed_config.tp_plan, dict) else {}
            plan = {**model.tp_plan, **override} if distributed_config.tp_size > 1 else {}
            check_degrees(model.config, distributed_config, plan)
            check_quantization(model, distributed_config)
            dequantize_uneven(model, distributed_config.tp_size, plan)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def check_shared_layout(self, layout: str) -> None:
        """Raises a `ValueError` for files whose QKV rows no rank can take its heads from.

        Args:
            layout: of a `CheckpointReport`.
        """
        shares = [style for name, style in self.tp_plan.items() if name.endswith("qkv_proj")]
        if layout == "plain" and self.config.distributed_config.tp_size > 1 and "colwise" in shares:
            raise ValueError(
                "`fused_qkv_layout`: expected 'chunked' or split projections with tp_size, got 'plain', whose rows "
                "are not in the order of heads: write split ones with `mimo convert --layout split`."
            )


__all__ = ["MiMoV2ParallelMixin", "attention_degrees", "replicated_attention"]
