"""The vision tower against tests/vision_reference.py: batches, orders, windows, sinks, gradients, memory, errors."""

import copy
import csv
import gzip
import json
from pathlib import Path

import pytest
import torch
from tiny import PATCH_VALUES, TINY_VISION, assert_near, randomize, sight_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vision_reference import column_order, patch_coordinates, vision_tower

import modeling_mimo
from modeling_mimo.configuration_mimo_v2_vision import MiMoV2VisionConfig
from modeling_mimo.modeling_mimo_v2_base import window_attention
from modeling_mimo.modeling_mimo_v2_vision import MiMoV2VisionModel, merged_order


pytestmark = pytest.mark.usefixtures("one_thread")
DATA = Path(modeling_mimo.__file__).parent / "data/MiMo-V2.5"
W = TINY_VISION["visual_token_window_size"]
SINK_TYPES = ["first_key", "null_logit"]
# one merge unit, one row of units, one column, wide, tall, videos; at most W + 1 patches and many windows of them
GRIDS = [[1, 2, 2], [1, 2, 10], [1, 10, 2], [1, 4, 6], [3, 6, 4], [1, 6, 10], [2, 2, 4], [2, 2, 2]]


def tiny_tower(seed=0, sink_scale=3.0, **changes):
    """A random float32 tower, its sinks as large as the spread of the logits, and its released config."""
    released = copy.deepcopy({**TINY_VISION, **changes})
    tower = randomize(MiMoV2VisionModel(MiMoV2VisionConfig(**released)), seed).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith("sinks"):
                parameter.mul_(sink_scale)
    return tower, released


def patches(grid, seed=1):
    count = sum(t * h * w for t, h, w in grid)
    return torch.randn(count, PATCH_VALUES, generator=torch.Generator().manual_seed(seed))


def encode(tower, pixels, grid):
    with torch.no_grad():
        return tower(pixels, torch.tensor(grid))


def reference(tower, pixels, grid, released):
    with torch.no_grad():
        return vision_tower(pixels, grid, released, dict(tower.named_parameters()))


def frames_alone(tower, pixels, grid):
    """The features of every frame when the tower is given nothing else."""
    outputs, start = [], 0
    for frames, height, width in grid:
        for _ in range(frames):
            stop = start + height * width
            outputs.append(encode(tower, pixels[start:stop], [[1, height, width]]))
            start = stop
    return torch.cat(outputs)


# Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink_type", SINK_TYPES)
def test_images_and_videos_in_one_batch_equal_the_reference(sink_type):
    tower, released = tiny_tower(sink_type=sink_type)
    pixels = patches(GRIDS)
    expected = reference(tower, pixels, GRIDS, released)
    assert expected.shape == (len(pixels) // 4, TINY_VISION["out_hidden_size"])
    assert expected.std() > 0.1
    assert_near(encode(tower, pixels, GRIDS), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sink": False},
        {"visual_token_window_size": 1},
        {"visual_token_window_size": 4},
        {"visual_token_window_size": 23},
        {"visual_token_window_size": 24},
        {"visual_token_window_size": 1000},
        {"vit_window_attn_types": [1] * 6, "fullatt_block_indexes": []},
        {"vit_window_attn_types": [0, 1, 0, 1, -1, 1], "fullatt_block_indexes": [4]},
        {"num_key_value_heads": 4, "num_query_groups": 1},
        {"num_key_value_heads": 1, "num_query_groups": 4},
        {"spatial_merge_size": 1},
        {"head_dim": 16},
    ],
    ids=str,
)
def test_other_towers_equal_the_reference(changes):
    tower, released = tiny_tower(**changes)
    grid = [[1, 4, 6], [2, 2, 4]]
    pixels = patches(grid)
    assert_near(encode(tower, pixels, grid), reference(tower, pixels, grid, released))


def test_the_released_window_of_64_patches_equals_the_reference():
    tower, released = tiny_tower(visual_token_window_size=64)
    grid = [[1, 14, 12]]
    pixels = patches(grid)
    assert_near(encode(tower, pixels, grid), reference(tower, pixels, grid, released))


@pytest.mark.parametrize("other", ["no_sinks", "other_type", "other_order", "other_window", "weaker"])
def test_the_tolerance_sees_wrong_sinks_orders_and_windows(other):
    tower, released = tiny_tower()
    grid = [[1, 6, 8]]
    pixels = patches(grid)
    weights = dict(tower.named_parameters())
    if other in ("no_sinks", "weaker"):
        factor = 0 if other == "no_sinks" else 0.9
        weights = {name: part * factor if name.endswith("sinks") else part for name, part in weights.items()}
    else:
        released |= {
            "other_type": {"sink_type": "null_logit"},
            "other_order": {"vit_window_attn_types": [-1, 1, 1, 0, 0, -1]},
            "other_window": {"visual_token_window_size": W - 1},
        }[other]
    with torch.no_grad():
        wrong = vision_tower(pixels, grid, released, weights)
    assert (encode(tower, pixels, grid) - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("sink_type", SINK_TYPES)
def test_a_batch_equals_each_image_and_each_frame_alone(sink_type):
    tower, _ = tiny_tower(sink_type=sink_type)
    # repeated sizes, side by side and apart: these share a batch, those do not
    grid = [[1, 6, 8], [1, 6, 8], [5, 6, 8], [1, 8, 6], [1, 6, 8], [3, 2, 2]]
    pixels = patches(grid)
    assert_near(encode(tower, pixels, grid), frames_alone(tower, pixels, grid), 1e-5)


def test_no_patch_sees_another_frame():
    tower, _ = tiny_tower()
    grid = [[2, 6, 8], [1, 6, 8]]
    pixels = patches(grid)
    changed = pixels.clone()
    changed[48:96] = 0
    before, after = encode(tower, pixels, grid), encode(tower, changed, grid)
    assert_near(after[:12], before[:12], 1e-6)
    assert_near(after[24:], before[24:], 1e-6)
    assert (after[12:24] - before[12:24]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("sink_type", SINK_TYPES)
def test_a_strong_sink_takes_all_and_a_weak_one_nothing(sink_type):
    grid = [[1, 4, 6]]
    for strength in (-1e4, 1e4):
        tower, released = tiny_tower(sink_type=sink_type)
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                if name.endswith("sinks"):
                    parameter.fill_(strength)
        pixels = patches(grid)
        assert_near(encode(tower, pixels, grid), reference(tower, pixels, grid, released))


@pytest.mark.parametrize("sink_type", SINK_TYPES)
def test_bfloat16_is_as_close_as_its_rounding(sink_type):
    tower, _ = tiny_tower(sink_type=sink_type)
    pixels = patches(GRIDS)
    exact = encode(tower, pixels, GRIDS)
    # weights and pixels that bfloat16 holds exactly
    rounded = copy.deepcopy(tower).bfloat16()
    exact_of_rounded = encode(copy.deepcopy(rounded).float(), pixels.bfloat16().float(), GRIDS)
    got = encode(rounded, pixels, GRIDS)
    assert got.dtype == torch.bfloat16
    error = (got.float() - exact_of_rounded).norm() / exact_of_rounded.norm()
    assert error < 0.03
    assert (exact - exact_of_rounded).norm() / exact.norm() < 0.05


def test_no_media_give_no_features():
    tower, _ = tiny_tower()
    features = tower(torch.zeros(0, PATCH_VALUES), torch.zeros(0, 3, dtype=torch.long))
    assert features.shape == (0, TINY_VISION["out_hidden_size"])


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 6), (8, 2), (4, 6)])
def test_coordinates_and_column_order(height, width):
    row, column, order = merged_order(height, width, 2, torch.device("cpu"))
    assert list(zip(row.tolist(), column.tolist())) == patch_coordinates(height, width, 2)
    assert order.tolist() == column_order(height, width, 2)


# Gradients ------------------------------------------------------------------------------------------------------


def gradients(output, tower, pixels):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*tower.named_parameters())
    found = torch.autograd.grad((output * weight).sum(), [pixels, *parameters])
    return dict(zip(["pixels", *names], found))


@pytest.mark.parametrize("sink_type", SINK_TYPES)
def test_gradients_equal_those_of_the_reference(sink_type):
    tower, released = tiny_tower(sink_type=sink_type)
    grid = [[1, 4, 6], [2, 2, 4], [1, 2, 2]]
    pixels = patches(grid).requires_grad_()
    got = gradients(tower(pixels, torch.tensor(grid)), tower, pixels)
    parameters = dict(tower.named_parameters())
    expected = gradients(vision_tower(pixels, grid, released, parameters), tower, pixels)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, name
        assert_near(got[name] / gradient.norm(), gradient / gradient.norm())


def test_gradient_checkpointing_runs_blocks_again_and_changes_nothing():
    grid = [[1, 4, 6], [2, 2, 2]]
    pixels = patches(grid).requires_grad_()
    found, calls = [], []
    for checkpointing in (False, True):
        model = sight_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        calls.append([])
        model.visual.blocks[2].attn.register_forward_hook(lambda *_: calls[-1].append(1))
        found.append(gradients(model.visual(pixels, torch.tensor(grid)), model.visual, pixels))
    assert [len(each) for each in calls] == [1, 2]
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient, 1e-5 * max(1.0, gradient.abs().max().item()))


def test_frozen_pixels_and_inference_leave_no_graph():
    tower, _ = tiny_tower()
    grid = [[1, 4, 6]]
    assert tower(patches(grid), torch.tensor(grid)).requires_grad
    with torch.inference_mode():
        assert not tower(patches(grid), torch.tensor(grid)).requires_grad


# Memory ---------------------------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, and of all of them together."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest, self.total = max([self.largest, *sizes]), self.total + sum(sizes)
        return result


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("sink_name", ["first_key_bias", "sinks"])
def test_window_attention_needs_memory_linear_in_the_length(sink_name, backward):
    needed = {}
    for length in (1024, 4096):
        query, key, value = (torch.randn(1, heads, length, 16, requires_grad=backward) for heads in (4, 2, 2))
        with Allocated() as needed[length]:
            sinks = {sink_name: torch.zeros(4, requires_grad=backward)}
            output = window_attention(query, key, value, 64, 0.25, **sinks)
            if backward:
                output.sum().backward()
    assert needed[4096].largest <= 4.2 * needed[1024].largest
    assert needed[4096].total <= 4.2 * needed[1024].total


def test_a_tower_never_makes_a_patches_by_patches_tensor():
    tower, _ = tiny_tower(hidden_size=8, intermediate_size=8, head_dim=4)
    grid = [[1, 64, 64]]
    pixels = torch.zeros(4096, PATCH_VALUES)
    with Allocated() as memory:
        encode(tower, pixels, grid)
    # patches themselves are 4096 x 1536
    assert memory.largest <= pixels.numel()


# Inputs and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((24, PATCH_VALUES), [[1, 4, 4]], "`pixel_values`: expected 16 patches for `grid_thw`, got 24"),
        ((24, PATCH_VALUES), [[1, 4, 4], [2, 2, 4]], "`pixel_values`: expected 32 patches for `grid_thw`, got 24"),
        ((24, PATCH_VALUES - 1), [[1, 4, 6]], r"`pixel_values`: expected \[patches, 1536\].* got \[24, 1535\]"),
        ((1, 24, PATCH_VALUES), [[1, 4, 6]], r"`pixel_values`: expected \[patches, 1536\].* got \[1, 24, 1536\]"),
        ((15, PATCH_VALUES), [[1, 3, 5]], r"`grid_thw\[0\]`: expected .* multiples of 2, got \[1, 3, 5\]"),
        ((22, PATCH_VALUES), [[1, 4, 4], [1, 2, 3]], r"`grid_thw\[1\]`: expected .* multiples of 2, got \[1, 2, 3\]"),
        ((24, PATCH_VALUES), [[0, 4, 6]], r"`grid_thw\[0\]`: expected positive .* got \[0, 4, 6\]"),
        ((24, PATCH_VALUES), [1, 4, 6], r"`grid_thw`: expected \[media, 3\], got \[3\]"),
        ((24, PATCH_VALUES), [[4, 6]], r"`grid_thw`: expected \[media, 3\], got \[1, 2\]"),
    ],
)
def test_wrong_inputs_are_named_with_both_sizes(shape, grid, message):
    tower, _ = tiny_tower()
    with pytest.raises(ValueError, match=message) as raised:
        tower(torch.zeros(shape), torch.tensor(grid))
    assert "\n" not in str(raised.value)


def test_names_and_shapes_are_those_of_the_released_files():
    with gzip.open(DATA / "tensor_manifest.tsv.gz", "rt") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row[0].startswith("visual.")]
    released = {name.removeprefix("visual."): tuple(map(int, shape.split("x"))) for name, _, shape, *_ in rows}
    assert len(released) == 364
    config = json.loads((DATA / "config.json").read_text())["vision_config"]
    with torch.device("meta"):
        tower = MiMoV2VisionModel(MiMoV2VisionConfig(**config))
    assert {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()} == released
    assert sum(parameter.numel() for parameter in tower.parameters()) == 728_594_432
