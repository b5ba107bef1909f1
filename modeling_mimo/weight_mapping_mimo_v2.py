"""Which tensors a MiMo-V2 checkpoint holds, and which parameter of the model each one becomes: data, no files.

`released_tensors` is the one table. Loading checks the headers of the files against it, the meta-device test checks
the model against it, and conversion runs it in both directions. The module names of the model are the released
names; only routed experts differ, which are stacked into two tensors per layer.
"""

from collections.abc import Iterator
from typing import NamedTuple

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .configuration_mimo_v2 import AttentionGeometry, MiMoV2Config
from .configuration_mimo_v2_audio import MiMoV2AudioConfig
from .configuration_mimo_v2_vision import MiMoV2VisionConfig


# rows and columns of one FP8 scale block in every release
FP8_BLOCK = 128

# columns that share one exponent, and values per byte, of the MXFP4 experts of V2.6
MXFP4_GROUP = 32
MXFP4_PER_BYTE = 2


class ReleasedTensor(NamedTuple):
    """One weight of a released checkpoint.

    `quantized` says that it is FP8 in the FP8 releases, with a `<name>_scale_inv` beside it; `chunks` is the number
    of row groups its scale blocks are counted in (the TP shards of a fused projection, else 1). `target` is the
    parameter it is loaded into.
    """

    shape: tuple[int, ...]
    part: str
    target: str
    quantized: bool = False
    chunks: int = 1

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of the scale grid: blocks of 128 rows are counted inside each chunk, the last one may be partial."""
        rows, columns = self.shape
        return self.chunks * -(-rows // self.chunks // FP8_BLOCK), -(-columns // FP8_BLOCK)

    @property
    def mxfp4_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the U8 weight and the U8 `<name>_scale` that take its place in MXFP4."""
        rows, columns = self.shape
        return (rows, -(-columns // MXFP4_PER_BYTE)), (rows, -(-columns // MXFP4_GROUP))


def weight_name(name: str) -> str:
    """The weight that a `<name>_scale_inv` (FP8) or `<name>_scale` (MXFP4) belongs to; another name as it is."""
    return name.removesuffix("_inv").removesuffix("_scale")


def expert_conversions(suffix: str = "") -> list[WeightConverter]:
    """Per-expert tensors of the files to and from the two stacked tensors of a layer, for Transformers' loader.

    Args:
        suffix: `""` for the weights, `"_scale_inv"` or `"_scale"` for what FP8 or MXFP4 modules keep beside them.
    """
    return [
        WeightConverter(
            [f"mlp.experts.*.gate_proj.weight{suffix}", f"mlp.experts.*.up_proj.weight{suffix}"],
            f"mlp.experts.gate_up_proj{suffix}",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            f"mlp.experts.*.down_proj.weight{suffix}",
            f"mlp.experts.down_proj{suffix}",
            [MergeModulelist(dim=0)],
        ),
    ]


def released_tensors(config: MiMoV2Config, fused_qkv_layout: str = "chunked") -> dict[str, ReleasedTensor]:
    """Every weight of the checkpoint that `config` describes, by released name, without FP8 scales.

    Args:
        fused_qkv_layout: `"chunked"` or `"plain"`; changes the scale grid of a fused projection, not its shape.
    """
    tensors = dict(_text_tensors(config, fused_qkv_layout))
    tensors.update(_mtp_tensors(config, fused_qkv_layout))
    if config.vision_config is not None:
        tensors.update(_vision_tensors(config.vision_config))
    if config.audio_config is not None:
        tensors.update(_audio_tensors(config.audio_config))
    return tensors


def _text_tensors(config: MiMoV2Config, layout: str) -> Iterator[tuple[str, ReleasedTensor]]:
    hidden = config.hidden_size

    def same(name: str, shape: tuple[int, ...], part: str) -> tuple[str, ReleasedTensor]:
        return name, ReleasedTensor(shape, part, name)

    yield same("model.embed_tokens.weight", (config.vocab_size, hidden), "embeddings")
    yield same("model.norm.weight", (hidden,), "norms")
    if not config.tie_word_embeddings:
        yield same("lm_head.weight", (config.vocab_size, hidden), "embeddings")
    for index, (layer_type, mlp_type) in enumerate(zip(config.layer_types, config.mlp_layer_types)):
        layer = f"model.layers.{index}"
        yield same(f"{layer}.input_layernorm.weight", (hidden,), "norms")
        yield same(f"{layer}.post_attention_layernorm.weight", (hidden,), "norms")
        geometry = config.attention_geometry(layer_type)
        yield from _attention_tensors(f"{layer}.self_attn", config, geometry, layout, "attention")
        if mlp_type == "dense":
            yield from _mlp_tensors(f"{layer}.mlp", hidden, config.intermediate_size, "dense_mlp")
            continue
        yield same(f"{layer}.mlp.gate.weight", (config.n_routed_experts, hidden), "router")
        yield same(f"{layer}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,), "router")
        for expert in range(config.n_routed_experts):
            yield from _expert_tensors(f"{layer}.mlp.experts", expert, config)


def _attention_tensors(
    prefix: str, config: MiMoV2Config, geometry: AttentionGeometry, layout: str, part: str
) -> Iterator[tuple[str, ReleasedTensor]]:
    hidden, sizes = config.hidden_size, geometry.qkv_sizes
    # CODEPATH: V2.5, V2.5-Pro and V2.6 are fused, V2-Flash is split
    if config.attention_projection_layout == "fused_qkv":
        chunks = 1 if layout == "plain" else geometry.qkv_chunks
        projections = {"qkv_proj": sum(sizes)}
    else:
        chunks, projections = 1, dict(zip(("q_proj", "k_proj", "v_proj"), sizes))
    for projection, rows in projections.items():
        name = f"{prefix}.{projection}.weight"
        yield name, ReleasedTensor((rows, hidden), part, name, True, chunks)
        # in no release
        if config.attention_bias:
            name = f"{prefix}.{projection}.bias"
            yield name, ReleasedTensor((rows,), part, name)
    name = f"{prefix}.o_proj.weight"
    yield name, ReleasedTensor((hidden, geometry.num_heads * geometry.v_head_dim), part, name)
    if geometry.has_sinks:
        name = f"{prefix}.attention_sink_bias"
        yield name, ReleasedTensor((geometry.num_heads,), "sinks" if part == "attention" else part, name)


def _mlp_tensors(prefix: str, hidden: int, intermediate: int, part: str) -> Iterator[tuple[str, ReleasedTensor]]:
    for name, shape in (
        ("gate_proj", (intermediate, hidden)),
        ("up_proj", (intermediate, hidden)),
        ("down_proj", (hidden, intermediate)),
    ):
        name = f"{prefix}.{name}.weight"
        yield name, ReleasedTensor(shape, part, name, True)


def _expert_tensors(prefix: str, expert: int, config: MiMoV2Config) -> Iterator[tuple[str, ReleasedTensor]]:
    stacked = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
    for name, tensor in _mlp_tensors(
        f"{prefix}.{expert}", config.hidden_size, config.moe_intermediate_size, "experts"
    ):
        projection = name.rsplit(".", 2)[1]
        yield name, tensor._replace(target=f"{prefix}.{stacked[projection]}")


def _mtp_tensors(config: MiMoV2Config, layout: str) -> Iterator[tuple[str, ReleasedTensor]]:
    """Draft heads: a sliding layer with a dense MLP each, no embedding and no head of their own."""
    hidden = config.hidden_size
    geometry = config.attention_geometry("sliding_attention")
    for index in range(config.num_mtp_layers):
        layer = f"model.mtp.layers.{index}"
        yield from _attention_tensors(f"{layer}.self_attn", config, geometry, layout, "mtp")
        yield from _mlp_tensors(f"{layer}.mlp", hidden, config.intermediate_size, "mtp")
        name = f"{layer}.eh_proj.weight"
        yield name, ReleasedTensor((hidden, 2 * hidden), "mtp", name)
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            name = f"{layer}.{norm}.weight"
            yield name, ReleasedTensor((hidden,), "mtp", name)


def _vision_tensors(vision: MiMoV2VisionConfig) -> Iterator[tuple[str, ReleasedTensor]]:
    """364 tensors in V2.5: biases on qkv, proj and mlp, sinks on windowed blocks, a bias-free merger."""
    hidden, intermediate = vision.hidden_size, vision.intermediate_size
    query, key_value = vision.num_attention_heads * vision.head_dim, vision.num_key_value_heads * vision.head_dim
    patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes = {"patch_embed.proj.weight": (hidden, vision.num_channels, *patch)}
    for index, block_type in enumerate(vision.block_types):
        block = f"blocks.{index}"
        shapes |= {f"{block}.norm1.weight": (hidden,), f"{block}.norm2.weight": (hidden,)}
        for name, rows, columns in (
            ("attn.qkv", query + 2 * key_value, hidden),
            ("attn.proj", hidden, query),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ):
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
        if vision.use_sink and block_type != "full":
            shapes[f"{block}.attn.sinks"] = (vision.num_attention_heads,)
    merged = hidden * vision.spatial_merge_size**2
    shapes |= {
        "merger.ln_q.weight": (hidden,),
        "merger.mlp.0.weight": (merged, merged),
        "merger.mlp.2.weight": (vision.out_hidden_size, merged),
    }
    for name, shape in shapes.items():
        yield f"visual.{name}", ReleasedTensor(shape, "vision", f"visual.{name}")


def _audio_tensors(audio: MiMoV2AudioConfig) -> Iterator[tuple[str, ReleasedTensor]]:
    """95 tensors in V2.5: 20 code embeddings, a 6-layer local transformer, a two-layer projection."""
    hidden, intermediate = audio.hidden_size, audio.intermediate_size
    heads = audio.num_attention_heads * audio.head_dim
    shapes = {f"speech_embeddings.{i}.weight": (audio.speech_vocab_size, hidden) for i in range(audio.audio_channels)}
    transformer = "audio_encoder.input_local_transformer"
    for index in range(audio.num_hidden_layers):
        layer = f"{transformer}.layers.{index}"
        shapes |= {f"{layer}.input_layernorm.weight": (hidden,), f"{layer}.post_attention_layernorm.weight": (hidden,)}
        for letter in "qkv":
            shapes |= {
                f"{layer}.self_attn.{letter}_proj.weight": (heads, hidden),
                f"{layer}.self_attn.{letter}_proj.bias": (heads,),
            }
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (hidden, heads),
            f"{layer}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.up_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, intermediate),
        }
    if audio.add_post_norm:
        shapes[f"{transformer}.norm.weight"] = (hidden,)
    grouped = hidden * audio.group_size
    # CODEPATH: two layers in V2.5 and V2.6
    if audio.projection_layers == 1:
        shapes["audio_encoder.projection.weight"] = (audio.out_hidden_size, grouped)
    else:
        shapes["audio_encoder.projection.mlp.0.weight"] = (grouped * 4, grouped)
        shapes["audio_encoder.projection.mlp.2.weight"] = (audio.out_hidden_size, grouped * 4)
    for name, shape in shapes.items():
        yield name, ReleasedTensor(shape, "audio", name)
