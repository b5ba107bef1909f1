"""The vision tower at MiMo-V2.5's size on one large image: windows against dense masks and against bare products.

    python benchmarks/vision.py --repeats 3

The dense side is the same tower with the same weights, whose windowed blocks call PyTorch's attention with an additive
mask of patches x patches per head. The mask is built before the clock starts; per block only its sinks are written.
The floor is the tower's own matrix products and its four full attentions, nothing else. Memory is measured in a
process of its own per size (Linux): peak of one windowed attention module minus what was resident before.
"""

import json
import math
import sys

import torch
import torch.nn.functional as F
from common import (
    GIB,
    Bar,
    child_task,
    finish,
    interleaved,
    parse,
    parser,
    reset_peak,
    resident_bytes,
    run_child,
)
from torch import nn

from modeling_mimo.configuration_mimo_v2_vision import MiMoV2VisionConfig
from modeling_mimo.modeling_mimo_v2_vision import MiMoV2VisionAttention, MiMoV2VisionModel


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
QUICK = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
SIDES = ("ours", "dense masks", "floor")


class DenseAttention(MiMoV2VisionAttention):
    """Windows by an additive mask [heads, patches, patches], which all blocks share."""

    mask = None

    def attend(self, query, key, value):
        if self.block_type == "full":
            return super().attend(query, key, value)
        DenseAttention.mask[:, : self.window + 1, 0] = self.sinks[:, None]
        output = F.scaled_dot_product_attention(
            query, key, value, self.mask[None], scale=self.scaling, enable_gqa=True
        )
        return output.transpose(1, 2)


def random_tower(config: MiMoV2VisionConfig, dtype: torch.dtype) -> MiMoV2VisionModel:
    torch.manual_seed(0)
    tower = MiMoV2VisionModel(config).to(dtype).eval()
    for name, parameter in tower.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter)
    return tower


def dense_twin(tower: MiMoV2VisionModel, patches: int) -> MiMoV2VisionModel:
    """The same weights, not copied, with dense masks."""
    config = tower.config
    with torch.device("meta"):
        twin = MiMoV2VisionModel(config).eval()
        for block, block_type in zip(twin.blocks, config.block_types):
            block.attn = DenseAttention(config, block_type)
    twin.load_state_dict(tower.state_dict(), assign=True)
    twin.rotary_pos_emb = tower.rotary_pos_emb
    dtype = tower.patch_embed.proj.weight.dtype
    mask = torch.full((patches, patches), -math.inf, dtype=dtype)
    for row in range(patches):
        mask[row, max(row - config.sliding_window, 0) : row + config.sliding_window + 1] = 0
    DenseAttention.mask = mask.repeat(config.num_attention_heads, 1, 1)
    return twin


def floor(tower: MiMoV2VisionModel, patches: int):
    """Every matrix product of the tower and its full attentions, on inputs that were there before."""
    config, merged = tower.config, tower.config.spatial_merge_size**2
    dtype = tower.patch_embed.proj.weight.dtype
    weights = [(patches, tower.patch_embed.proj.weight.flatten(1))]
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear):
            weights.append((patches // merged if name.startswith("merger") else patches, module.weight))
    inputs = {(rows, weight.shape[1]): torch.randn(rows, weight.shape[1], dtype=dtype) for rows, weight in weights}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    states = torch.randn(1, heads + 2 * kv_heads, patches, config.head_dim, dtype=dtype)
    query, key, value = states.split([heads, kv_heads, kv_heads], dim=1)

    def run():
        for rows, weight in weights:
            F.linear(inputs[rows, weight.shape[1]], weight)
        for _ in range(config.block_types.count("full")):
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return run


@torch.inference_mode()
def attention_memory(task: dict) -> dict:
    """Peak extra bytes of one windowed attention module on a square image, in this fresh process."""
    config = MiMoV2VisionConfig(**task["config"], num_hidden_layers=1, block_types=["row"])
    tower = random_tower(config, DTYPES[task["dtype"]])
    attention = tower.blocks[0].attn

    def run(side: int) -> int:
        layout = tower.patch_layout(torch.tensor([[1, side, side]]), torch.device("cpu"))
        states = torch.randn(side * side, config.hidden_size, dtype=DTYPES[task["dtype"]])
        before = reset_peak()
        attention(states, layout)
        return resident_bytes("VmHWM") - before

    # a small image first: libraries are loaded and kernels compiled
    run(16)
    return {"extra": run(task["side"])}


@torch.inference_mode()
def measure(config: MiMoV2VisionConfig, dtype: torch.dtype, side: int, repeats: int) -> tuple[dict, dict, float]:
    """Median seconds of one windowed attention and of the tower per side, and how far the features are apart."""
    tower, patches = random_tower(config, dtype), side * side
    twin = dense_twin(tower, patches)
    pixels = torch.randn(patches, 3 * config.temporal_patch_size * config.patch_size**2)
    grid = torch.tensor([[1, side, side]])
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    # heads side by side, as the projection writes them
    states = torch.randn(patches, heads + 2 * kv_heads, config.head_dim, dtype=dtype).transpose(0, 1)[None]
    parts = states.split([heads, kv_heads, kv_heads], dim=1)
    modules = {name: model.blocks[1].attn for name, model in zip(SIDES, (tower, twin))}
    functions = {name: lambda attn=module: attn.attend(*parts) for name, module in modules.items()}
    attention = interleaved(functions, 3 * repeats)
    ours, dense = tower(pixels, grid).float(), twin(pixels, grid).float()
    functions = (lambda: tower(pixels, grid), lambda: twin(pixels, grid), floor(tower, patches))
    return attention, interleaved(dict(zip(SIDES, functions)), repeats), ((ours - dense).norm() / dense.norm()).item()


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    if task := child_task(arguments):
        print(json.dumps(attention_memory(task)))
        return 0
    options = parser("The vision tower against dense masks and bare products.", "vision.py --dtype float32")
    options.add_argument("--side", type=int, default=None, help="patches per side of the image, even (default: 64)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16, as released")
    options = parse(options, arguments, repeats=3)
    side, fields = options.side or (16 if options.quick else 64), QUICK if options.quick else {}
    config, patches = MiMoV2VisionConfig(**fields), side * side
    extra = {}
    for length in (side, 2 * side):
        task = {"threads": options.threads, "dtype": options.dtype, "side": length, "config": fields}
        extra[length] = run_child(__file__, task, attention_memory if options.quick else None)["extra"]
    attention, whole, apart = measure(config, DTYPES[options.dtype], side, options.repeats)
    rows = []
    for what, times in (("one windowed attention", attention), ("tower", whole)):
        rows += [[what, name, took * 1e3, took / times["ours"]] for name, took in times.items()]
    tower_floor = whole["ours"] / whole["floor"]
    speed = attention["dense masks"] / attention["ours"], whole["dense masks"] / whole["ours"]
    growth = extra[2 * side] / max(1, extra[side])
    judged = [None if options.quick else value for value in (*speed, growth, tower_floor)]
    bars = [
        Bar("difference of the features from those with dense masks, relative", apart, 0.02, at_least=False),
        Bar("times faster than dense masks, windowed attention", judged[0], 8),
        Bar("times faster than dense masks, tower", judged[1], 1.7),
        Bar("attention memory for four times the patches", judged[2], 4.4, at_least=False),
        Bar("tower's time against its matrix products and full attentions", judged[3], 1.5, at_least=False),
    ]
    notes = [
        f"One windowed attention module: {extra[length] / GIB:.3f} GiB at {length**2} patches."
        for length in (side, 2 * side)
    ]
    setting = (
        f"{config.num_hidden_layers} blocks, {config.block_types.count('full')} of them full, hidden size "
        f"{config.hidden_size}, one image of {side} x {side} = {patches} patches; {options.dtype}, random weights; "
        f"median of {options.repeats}, attention alone of {3 * options.repeats}."
    )
    return finish(options.json, setting, ["what", "side", "ms", "times ours"], rows, bars, notes)


if __name__ == "__main__":
    sys.exit(main())
