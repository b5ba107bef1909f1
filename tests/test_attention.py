"""The attention primitive: the fast path against an independent formula, its gradients, and its memory."""

from types import SimpleNamespace

import pytest
import torch
from tiny import assert_near, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_mimo.modeling_mimo_v2_base import (
    apply_rotary_,
    attend_without_sinks,
    causal_mask,
    eager_attention_forward,
    sdpa_attention_forward,
)


pytestmark = pytest.mark.usefixtures("one_thread")
W = 8
HEADS, DIM, V_DIM = 8, 24, 16
KV_HEADS = {None: 2, W: 4}
LENGTHS = [1, W - 1, W, W + 1, 2 * W - 1, 5 * W + 3]
# the GPU takes another way through `attend`
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
EVAL = SimpleNamespace(training=False)
SCALING = DIM**-0.5
PATHS = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}


def draw(queries, keys, window, batch=2, device="cpu", dtype=torch.float32):
    """query, key, value and sinks."""
    kv_heads = KV_HEADS[window]
    shapes = ((batch, HEADS, queries, DIM), (batch, kv_heads, keys, DIM), (batch, kv_heads, keys, V_DIM), (HEADS,))
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def oracle(query, key, value, key_mask, window, sinks):
    """Float64, one more softmax column for the sink, every step written out."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = (x[:, torch.arange(query.shape[1]) // groups] for x in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
    visible = (distance >= 0) & (distance < (keys if window is None else window))
    visible = visible.to(query.device)[None, None].expand(query.shape[0], 1, -1, -1)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :].bool()
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * SCALING
    scores = scores.masked_fill(~visible, -1e30)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(query.shape[0], -1, queries, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., :keys] * visible
    return torch.einsum("bhqk,bhkd->bqhd", weights, value)


def run(path, query, key, value, mask, window, sinks):
    return PATHS[path](EVAL, query, key, value, mask, scaling=SCALING, sliding_window=window, s_aux=sinks)[0]


def key_masks(keys, batch=2):
    """name -> [batch, keys] mask; both rows differ where they can."""
    position = torch.arange(keys)
    rows = {
        "left": [position >= keys // 3, position >= 0],
        "right": [position >= 0, position < keys - keys // 3],
        "holes": [position % 3 != 1, position % 5 != 0],
        "long_hole": [(position < 2) | (position >= keys - 2), position >= 0],
        "one_row_empty": [position < 0, position >= 0],
        "all_empty": [position < 0, position < 0],
    }
    return {name: torch.stack(pair)[:batch].long() for name, pair in rows.items()}


MASK_NAMES = list(key_masks(4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_sinks", [True, False])
@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_formula_around_window_multiples(length, window, with_sinks, path, device):
    query, key, value, sinks = draw(length, length, window, device=device)
    sinks = sinks if with_sinks else None
    assert_near(
        run(path, query, key, value, None, window, sinks), oracle(query, key, value, None, window, sinks), 1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("past", [1, W - 2, W - 1, W, 3 * W + 5])
@pytest.mark.parametrize("new", [1, 2, W, 3 * W + 1])
def test_a_cached_prefix_shorter_or_longer_than_the_window(new, past, window, path, device):
    query, key, value, sinks = draw(new, past + new, window, device=device)
    mask = key_masks(past + new)["holes"].to(device)
    for key_mask in (None, mask):
        expected = oracle(query, key, value, key_mask, window, sinks)
        assert_near(run(path, query, key, value, key_mask, window, sinks), expected, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_sinks", [True, False])
@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("mask_name", MASK_NAMES)
def test_key_masks(mask_name, window, with_sinks, path, device):
    for length in (W - 3, 3 * W + 2):
        query, key, value, sinks = draw(length, length, window, device=device)
        sinks = sinks if with_sinks else None
        mask = key_masks(length)[mask_name].to(device)
        expected = oracle(query, key, value, mask, window, sinks)
        got = run(path, query, key, value, mask, window, sinks)
        assert_near(got, expected, 1e-5)
        if mask_name == "all_empty":
            assert got.eq(0).all()


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, window):
    query, key, value, sinks = draw(5 * W + 3, 5 * W + 3, window, dtype=dtype)
    mask = key_masks(5 * W + 3)["left"]
    got = run("sdpa", query, key, value, mask, window, sinks)
    assert got.dtype == dtype
    assert_near(got, oracle(query, key, value, mask, window, sinks), 3e-2)


def test_more_than_one_query_block_of_global_and_more_than_one_step_of_sliding(monkeypatch):
    monkeypatch.setattr("modeling_mimo.modeling_mimo_v2_base.QUERY_BLOCK", 2 * W)
    for window in (None, W):
        query, key, value, sinks = draw(50, 61, window)
        mask = key_masks(61)["left"]
        expected = oracle(query, key, value, mask, window, sinks)
        assert_near(run("sdpa", query, key, value, mask, window, sinks), expected, 1e-5)


def relative_error(output, expected):
    return ((output.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
@pytest.mark.parametrize(("new", "past"), [(300, 0), (77, 41), (5, 200)])
def test_matrix_products_of_bfloat16_inference(new, past, sharpness, window, monkeypatch):
    # several blocks of queries, the last one ragged
    monkeypatch.setattr("modeling_mimo.modeling_mimo_v2_base.SCORE_ROWS", 128)
    monkeypatch.setattr("modeling_mimo.modeling_mimo_v2_base.QUERY_BLOCK", 4 * W)
    query, key, value, sinks = draw(new, past + new, window)
    query, key, value = ((x * sharpness).bfloat16() for x in (query, key, value))
    sinks = None if window is None else sinks.bfloat16()
    expected = oracle(query, key, value, None, window, sinks)
    with torch.no_grad():
        fast = relative_error(run("sdpa", query, key, value, None, window, sinks), expected)
        eager = relative_error(run("eager", query, key, value, None, window, sinks), expected)
    # the subtracted estimate keeps rounded scores from costing more than they do in eager
    assert fast < min(1.1 * eager, 0.01)


@pytest.mark.parametrize("with_sinks", [True, False])
@pytest.mark.parametrize("mask_name", MASK_NAMES)
def test_matrix_products_of_bfloat16_inference_with_padding(mask_name, with_sinks):
    query, key, value, sinks = (x.bfloat16() for x in draw(5 * W + 3, 5 * W + 3, W))
    sinks, key_mask = sinks if with_sinks else None, key_masks(5 * W + 3)[mask_name]
    with torch.no_grad():
        output = run("sdpa", query, key, value, key_mask, W, sinks)
    assert_near(output.double(), oracle(query, key, value, key_mask, W, sinks), 0.03)


@pytest.mark.parametrize("mask_name", [None, *MASK_NAMES])
def test_the_way_of_other_devices_without_sinks(mask_name):
    query, key, value, _ = draw(9, 9, None)
    key_mask = None if mask_name is None else key_masks(9)[mask_name].bool()
    visible = None if mask_name is None else causal_mask(key_mask, 9, 9, None, query.device)
    output = attend_without_sinks(query, key, value, visible, visible is None, SCALING).transpose(1, 2)
    assert_near(output, oracle(query, key, value, key_mask, None, None), 1e-5)


def test_one_row_mask_serves_the_whole_batch():
    query, key, value, sinks = draw(20, 20, W, batch=3)
    mask = torch.arange(20)[None] >= 4
    expected = oracle(query, key, value, mask.expand(3, -1), W, sinks)
    assert_near(run("sdpa", query, key, value, mask, W, sinks), expected, 1e-5)


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("mask_name", [None, "left"])
def test_decoding_equals_the_last_row(window, mask_name):
    length = 4 * W + 3
    query, key, value, sinks = draw(length, length, window)
    mask = None if mask_name is None else key_masks(length)[mask_name]
    full = run("sdpa", query, key, value, mask, window, sinks)
    assert_near(run("sdpa", query[:, :, -1:], key, value, mask, window, sinks), full[:, -1:], 1e-5)
    if window is not None:
        # what a bounded cache hands over
        mask = None if mask is None else mask[:, -window:]
        bounded = run("sdpa", query[:, :, -1:], key[:, :, -window:], value[:, :, -window:], mask, window, sinks)
        assert_near(bounded, full[:, -1:], 1e-5)


@pytest.mark.parametrize("additive", [True, False])
def test_an_explicit_mask_equals_the_same_key_mask(additive):
    length = 3 * W + 2
    query, key, value, sinks = draw(length, length, W)
    mask = key_masks(length)["left"]
    explicit = causal_mask(mask.bool(), length, length, W, query.device)
    if additive:
        explicit = torch.zeros(explicit.shape).masked_fill(~explicit, torch.finfo(torch.float32).min)
    assert_near(
        run("sdpa", query, key, value, explicit, W, sinks), run("sdpa", query, key, value, mask, W, sinks), 1e-5
    )


def test_a_strong_sink_takes_all_and_a_weak_one_nothing():
    query, key, value, sinks = draw(20, 20, W)
    without = run("sdpa", query, key, value, None, W, None)
    assert_near(run("sdpa", query, key, value, None, W, torch.full_like(sinks, -1e4)), without, 1e-6)
    assert run("sdpa", query, key, value, None, W, torch.full_like(sinks, 1e4)).eq(0).all()


def test_dropout_is_for_training_only_and_drops_weights():
    query, key, value, sinks = draw(20, 20, W)
    arguments = {"scaling": SCALING, "dropout": 0.999999, "sliding_window": W, "s_aux": sinks}
    inference = sdpa_attention_forward(EVAL, query, key, value, None, **arguments)[0]
    assert_near(inference, oracle(query, key, value, None, W, sinks), 1e-5)
    training = sdpa_attention_forward(SimpleNamespace(training=True), query, key, value, None, **arguments)[0]
    assert training.eq(0).float().mean() > 0.9


def test_eager_returns_the_weights_without_the_share_of_the_sink():
    query, key, value, sinks = draw(20, 20, W)
    output, weights = eager_attention_forward(
        EVAL, query, key, value, None, scaling=SCALING, sliding_window=W, s_aux=sinks
    )
    assert weights.shape == (2, HEADS, 20, 20)
    total = weights.sum(-1)
    assert (total < 1).all()
    assert (total > 0).all()
    assert weights.masked_select(~causal_mask(None, 20, 20, W, query.device)).eq(0).all()
    wide = value.repeat_interleave(HEADS // value.shape[1], dim=1)
    assert_near((weights @ wide).transpose(1, 2), output, 1e-6)


# Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_sinks", [True, False])
@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("mask_name", [None, "left", "holes", "one_row_empty"])
@pytest.mark.parametrize(("new", "past"), [(3 * W + 2, 0), (W - 2, 0), (W + 3, 5), (1, 2 * W)])
def test_gradients_equal_the_formulas(new, past, mask_name, window, with_sinks, path, device):
    tensors = draw(new, past + new, window, device=device)
    if not with_sinks:
        tensors.pop()
    mask = None if mask_name is None else key_masks(past + new)[mask_name].to(device)
    cotangent = torch.randn(2, new, HEADS, V_DIM, device=device)

    def gradients(function):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        query, key, value, sinks = (*leaves, None)[:4]
        output = function(query, key, value, mask, window, sinks)
        return torch.autograd.grad((output * cotangent).sum(), leaves)

    got, expected = gradients(lambda *arguments: run(path, *arguments)), gradients(oracle)
    assert expected[-1].abs().max() > 1e-3
    for one, other in zip(got, expected):
        assert_near(one, other, 5e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck_in_float64(window):
    query, key, value = (
        torch.randn(1, heads, 5, dim).double().requires_grad_() for heads, dim in ((4, 6), (2, 6), (2, 4))
    )
    sinks = torch.randn(4)

    def function(query, key, value):
        return sdpa_attention_forward(EVAL, query, key, value, None, scaling=0.4, sliding_window=window, s_aux=sinks)[
            0
        ]

    assert torch.autograd.gradcheck(function, (query, key, value))


# Memory ---------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, views included."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def largest(queries, keys, window, mask, backward=False, path="sdpa"):
    tensors = [tensor.requires_grad_(backward) for tensor in draw(queries, keys, window, batch=1)]
    with LargestTensor() as mode:
        output = run(path, *tensors[:3], mask, window, tensors[3])
        if backward:
            output.sum().backward()
    return mode.numel


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_sliding_layer_needs_memory_linear_in_the_length(with_mask, backward):
    sizes = {}
    for length in (1024, 4096):
        mask = torch.ones(1, length, dtype=torch.long) if with_mask else None
        sizes[length] = largest(length, length, W, mask, backward)
        # the inputs, with every key seen by two blocks of queries
        assert sizes[length] <= 2 * HEADS * length * DIM
    assert sizes[4096] <= 4 * sizes[1024]
    # the measure does see a quadratic path
    assert largest(1024, 1024, W, None, path="eager") >= HEADS * 1024 * 1024


class Written(TorchDispatchMode):
    """Counts the elements of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def written_in_backward(loss) -> int:
    with Written() as written:
        loss.backward()
    return written.elements


def test_the_gradient_of_a_sliding_layer_is_linear_in_the_batch():
    def cost(batch):
        query, key, value, sinks = draw(3 * W, 3 * W, W, batch)
        mask = torch.ones(batch, 3 * W, dtype=torch.bool)
        return written_in_backward(run("sdpa", query.requires_grad_(), key, value, mask, W, sinks).sum())

    # more rows than one step takes
    assert cost(512) < 4.5 * cost(128)


def test_the_gradient_of_experts_is_linear_in_their_number():
    def cost(experts):
        layer = tiny_model(n_routed_experts=experts, num_experts_per_tok=experts).train().model.layers[1].mlp
        return written_in_backward(layer(torch.randn(1, 4, 64)).sum())

    assert cost(32) < 5 * cost(8)


def test_a_padded_global_layer_masks_one_block_of_queries_at_a_time():
    length = 4096
    mask = torch.arange(length)[None] >= 7
    assert largest(length, length, None, mask) <= max(HEADS * length * DIM, 512 * length)
    assert largest(length, length, None, None) <= HEADS * length * DIM


@pytest.mark.parametrize("window", [None, W])
def test_decoding_never_expands_keys_over_the_query_heads(window):
    keys = 4096
    stored = KV_HEADS[window] * keys * DIM
    assert largest(1, keys, window, None) <= stored
    if window is not None:
        assert largest(1, keys, window, torch.ones(1, keys, dtype=torch.long)) <= stored


# Rotary ---------------------------------------------------------------------------------------------------------


def test_rotary_turns_the_first_dims_and_leaves_the_rest():
    states, rotary = torch.randn(2, 3, 5, DIM), 8
    angles = torch.randn(1, 5, rotary // 2)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    rotated = apply_rotary_(states.clone(), cos, sin)
    assert torch.equal(rotated[..., rotary:], states[..., rotary:])
    complex_in = torch.complex(states[..., : rotary // 2], states[..., rotary // 2 : rotary])
    expected = complex_in * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert_near(rotated[..., : rotary // 2], expected.real, 1e-6)
    assert_near(rotated[..., rotary // 2 : rotary], expected.imag, 1e-6)


def test_projecting_in_steps_equals_projecting_at_once(monkeypatch):
    attention = tiny_model().model.layers[1].self_attn
    states = torch.randn(2, 37, attention.config.hidden_size)
    with torch.no_grad():
        at_once = attention.project_in_steps(states)
        monkeypatch.setattr("modeling_mimo.modeling_mimo_v2_text.PROJECTION_STEP", 16)
        in_steps = attention.project_in_steps(states)
    for left, right in zip(in_steps, at_once):
        assert_near(left, right, 1e-6)
