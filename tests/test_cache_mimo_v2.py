"""HybridCache: what is stored, returned, rolled back, shared and saved. States carry their token position as value."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.mimo_v2_flash import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from modeling_mimo.cache_mimo_v2 import HybridCache, cache_fingerprint
from modeling_mimo.cache_names_mimo_v2 import CACHE_NAME


WINDOW = 6
ROLLBACK = 4
FP8 = torch.float8_e4m3fn
VARIANTS = [{}, {"global_dtype": FP8}, {"offload_global": True}]
IDS = ["plain", "fp8", "offload"]
# layer: (kv_heads, head_dim, v_head_dim), all different where the model allows it
SHAPES = [(1, 6, 4), (2, 6, 4), (2, 6, 4), (1, 6, 4)]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Every torch.empty is filled with NaN (255 for bytes), so that reading a row nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)


def make_config(**changes):
    fields = {
        "model_type": "mimo_v2",
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "hidden_size": 16,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "v_head_dim": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 6,
        "swa_v_head_dim": 4,
        "sliding_window": WINDOW,
        "rope_parameters": {"full_attention": {"rope_theta": 10000}, "sliding_attention": {"rope_theta": 10000.0}},
        "attention_value_scale": 0.7,
    }
    return SimpleNamespace(**{**fields, **changes})


def make_cache(**options):
    return HybridCache(make_config(), **{"max_rollback": ROLLBACK, **options})


def states_of(tokens, layer_idx, dtype=torch.float32):
    """Keys and values whose every element is the token's number; `tokens`: one list, or one per batch row."""
    rows = torch.tensor(tokens if tokens and isinstance(tokens[0], list) else [tokens], dtype=dtype)
    heads, key_width, value_width = SHAPES[layer_idx]
    return [rows[:, None, :, None].expand(-1, heads, -1, width) for width in (key_width, value_width)]


def feed(cache, tokens):
    """Updates every layer, checks what comes back against the mask sizes, returns the token numbers seen per layer."""
    seen, past = [], cache.get_seq_length()
    for layer_idx in range(4):
        keys, values = states_of(tokens, layer_idx)
        sizes = cache.get_mask_sizes(keys.shape[2], layer_idx)
        assert sum(sizes) == past + keys.shape[2]
        out_keys, out_values = cache.update(keys, values, layer_idx)
        assert out_keys.shape[2] == out_values.shape[2] == sizes[0]
        assert out_keys.shape[-1] == SHAPES[layer_idx][1]
        assert out_values.shape[-1] == SHAPES[layer_idx][2]
        assert torch.equal(out_keys[..., :1], out_values[..., :1])
        assert torch.equal(out_keys, out_keys[:, :1, :, :1].expand_as(out_keys))
        seen.append(out_keys[:, 0, :, 0].tolist())
    return seen


def expected(history, new):
    """What the layers must return for `new` tokens after `history`, for one batch row."""
    near = history[max(len(history) - (WINDOW - 1), 0) :] + new
    return [[history + new], [near], [near], [history + new]]


def seen_by(cache, tokens=(9,)):
    """What a fork of `cache` sees next: the whole state of the cache, leaving it as it is."""
    return feed(cache.fork(), list(tokens))


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
@pytest.mark.parametrize("chunks", [[1] * 40, [25, 1, 1], [3, 2, 7, 1, 5, 30, 4, 4, 1], [6, 5, 1], [5, 1], [40, 40]])
def test_returns_all_tokens_globally_and_the_window_locally(chunks, options):
    cache, history = make_cache(**options), []
    for length in chunks:
        new = [float(i % 200) for i in range(len(history), len(history) + length)]
        got = feed(cache, new)
        # fp8 rounds 3 mantissa bits of scaled values, but a row of equal values is exactly its own scale times 448
        torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(expected(history, new)[0]), rtol=1e-6, atol=0)
        assert got[1:3] == expected(history, new)[1:3]
        history += new
    assert cache.get_seq_length() == cache.get_seq_length(1) == sum(chunks)


@pytest.mark.parametrize("max_rollback", [0, 1, 4])
def test_mask_sizes_equal_transformers_sliding_layer(max_rollback):
    cache, oracle = make_cache(max_rollback=max_rollback), DynamicSlidingWindowLayer(WINDOW)
    for length in [1, 2, 2, 1, 1, 3, 12, 1]:
        for query in (1, 2, 9):
            assert cache.get_mask_sizes(query, 1) == oracle.get_mask_sizes(query)
        feed(cache, [0.0] * length)
        oracle.update(*states_of([0.0] * length, 1))


@pytest.mark.parametrize("max_rollback", [0, 1, 4])
def test_sliding_storage_is_bounded_and_not_copied_per_token(max_rollback):
    cache = make_cache(max_rollback=max_rollback)
    feed(cache, [0.0] * 500)
    buffer = cache.layers[1].buffers[0]
    assert buffer.shape[2] <= WINDOW + 2 * max_rollback
    for _ in range(50):
        feed(cache, [1.0])
    assert cache.layers[1].buffers[0] is buffer
    assert cache.layers[1].keys.shape[2] == WINDOW - 1 + max_rollback


def test_long_prefill_from_empty_returns_the_incoming_tensors():
    keys, values = states_of([float(i) for i in range(50)], 1)
    assert make_cache().update(keys, values, 1)[0] is keys


def test_decoding_moves_the_sliding_window_once_per_slack_not_per_token(monkeypatch):
    cache, moves, clone = make_cache(), [], torch.Tensor.clone
    feed(cache, [0.0] * 20)
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **kw: moves.append(1) or clone(self, **kw))
    for _ in range(50):
        cache.update(*states_of([1.0], 1), 1)
    # 2 buffers, once per max_rollback + 1 tokens
    assert 0 < len(moves) <= 2 * (50 // (ROLLBACK + 1) + 1)


def test_global_growth_is_geometric_and_prefill_is_tight():
    cache = make_cache()
    feed(cache, [0.0] * 1000)
    assert 1000 <= cache.layers[0].buffers[0].shape[2] <= 1256
    capacities = set()
    for _ in range(3000):
        cache.update(*states_of([0.0], 0), 0)
        capacity = cache.layers[0].buffers[0].shape[2]
        assert capacity <= cache.get_seq_length() + max(256, cache.get_seq_length() // 8)
        capacities.add(capacity)
    assert len(capacities) <= 12
    keys, _ = cache.update(*states_of([0.0], 0), 0)
    assert keys.data_ptr() == cache.layers[0].buffers[0].data_ptr()


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
@pytest.mark.parametrize("start", [1, 4, 5, 6, 7, 20])
def test_rollback_equals_never_drafted(start, options):
    cache, history = make_cache(**options), [1.0] * start
    feed(cache, history)
    for step, (drafts, rejected) in enumerate([(4, 4), (4, 0), (4, 3), (1, 1), (2, 1), (4, 4), (4, 4), (3, 2)] * 3):
        # One accepted token comes with every draft, as in assisted decoding; its value names the step
        new = [2.0 + step] + [100.0] * drafts
        assert feed(cache, new)[1:3] == expected(history, new)[1:3]
        cache.crop(-rejected)
        history += new[: len(new) - rejected]
        assert cache.get_seq_length() == cache.get_seq_length(1) == len(history)
        assert seen_by(cache)[1:3] == expected(history, [9.0])[1:3]


def test_crop_after_several_forwards_without_crop():
    cache = make_cache()
    history = [float(i) for i in range(30)]
    feed(cache, history[:20])
    for token in history[20:]:
        feed(cache, [token])
    cache.crop(-ROLLBACK)
    assert feed(cache, [9.0]) == expected(history[:-ROLLBACK], [9.0])


def test_max_rollback_tokens_can_be_cropped_after_any_forward():
    for length in range(1, 40):
        cache = make_cache()
        feed(cache, [float(i) for i in range(length)])
        cache.crop(-min(ROLLBACK, length))
        assert feed(cache, [9.0]) == expected([float(i) for i in range(max(length - ROLLBACK, 0))], [9.0])


@pytest.mark.parametrize("tokens_to_remove", [1, -5, -100])
def test_impossible_crop_is_refused_and_changes_nothing(tokens_to_remove):
    cache = make_cache()
    feed(cache, [float(i) for i in range(30)])
    before = seen_by(cache)
    with pytest.raises(ValueError, match=r"max_rollback=4\), got \d|negative number .* got 1"):
        cache.crop(tokens_to_remove)
    assert [layer.total for layer in cache.layers] == [30] * 4
    assert seen_by(cache) == before


def test_crop_cannot_go_deeper_by_repeating():
    cache = make_cache()
    feed(cache, [float(i) for i in range(30)])
    cache.crop(-ROLLBACK)
    with pytest.raises(ValueError, match=r"at most 0 .* got 1"):
        cache.crop(-1)


def test_crop_to_nothing_and_crop_of_nothing():
    cache = make_cache()
    cache.crop(0)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match=r"at most 0 .* got 1"):
        cache.crop(-1)
    feed(cache, [1.0, 2.0])
    cache.crop(-2)
    assert feed(cache, [[3.0], [4.0]]) == [[[3.0], [4.0]]] * 4


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_batch_operations(options):
    cache = make_cache(**options)
    feed(cache, [[1.0] * 8, [2.0] * 8])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert [row[0] for row in seen_by(cache, [[9.0], [9.0]])[1]] == [2.0, 1.0]
    cache.batch_repeat_interleave(2)
    assert [row[0] for row in seen_by(cache, [[9.0]] * 4)[0]] == [2.0, 2.0, 1.0, 1.0]
    cache.batch_select_indices(torch.tensor([0, 3, 2]))
    assert [row[0] for row in seen_by(cache, [[9.0]] * 3)[1]] == [2.0, 1.0, 1.0]
    cache.batch_select_indices(torch.tensor([True, False, False]))
    cache.crop(-1)
    assert seen_by(cache)[1:] == expected([2.0] * 7, [9.0])[1:]


def test_reset_forgets_everything_even_the_batch_size():
    cache = make_cache()
    feed(cache, [[1.0] * 8, [2.0] * 8])
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes()["total"] == 0
    assert feed(cache, [3.0]) == expected([], [3.0])


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_update_refuses_another_batch_or_dtype_instead_of_broadcasting(layer_idx):
    cache = make_cache()
    cache.update(*states_of([[1.0], [2.0]], layer_idx), layer_idx)
    with pytest.raises(ValueError, match=r"batch.*expected.*2.*got.*1"):
        cache.update(*states_of([3.0], layer_idx), layer_idx)
    with pytest.raises(ValueError, match=r"expected.*float32.*got.*bfloat16"):
        cache.update(*states_of([[3.0], [4.0]], layer_idx, torch.bfloat16), layer_idx)


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_snapshot_survives_appending_cropping_growing_reordering_and_many_restores(options):
    cache, history = make_cache(**options), [float(i % 100) for i in range(20)]
    feed(cache, history)
    snapshot, before = cache.snapshot(), seen_by(cache)
    cache.crop(-3)
    feed(cache, [50.0] * 5)
    for disturb in (lambda: None, lambda: feed(cache, [60.0] * 2000), lambda: cache.reorder_cache(torch.tensor([0]))):
        disturb()
        cache.restore(snapshot)
        assert seen_by(cache) == before
        assert cache.get_seq_length() == 20
        cache.crop(-ROLLBACK)
        assert seen_by(cache)[1:3] == expected(history[:-ROLLBACK], [9.0])[1:3]
        feed(cache, [70.0] * 3)
        cache.restore(snapshot)
        feed(cache, [80.0])
    cache.reset()
    cache.restore(snapshot)
    assert seen_by(cache) == before


def test_nested_snapshots_do_not_overwrite_each_other():
    cache = make_cache()
    snapshots, states = [], []
    for token in range(6):
        feed(cache, [float(token)] * 3)
        snapshots.append(cache.snapshot())
        states.append(seen_by(cache))
    for index in (5, 0, 3, 1, 4, 0, 5, 2):
        cache.restore(snapshots[index])
        feed(cache, [99.0] * 4)
        cache.restore(snapshots[index])
        assert seen_by(cache) == states[index]


def test_appending_after_a_restore_copies_nothing_while_nobody_else_needs_the_rows():
    cache = make_cache()
    feed(cache, [1.0] * 20)
    buffer, snapshot = cache.layers[0].buffers[0], cache.snapshot()
    for _ in range(3):
        feed(cache, [2.0] * 3)
        cache.restore(snapshot)
    assert feed(cache, [3.0]) == expected([1.0] * 20, [3.0])
    assert cache.layers[0].buffers[0] is buffer


def test_snapshot_and_fork_share_the_global_storage_until_written():
    cache = make_cache()
    feed(cache, [1.0] * 20)
    buffer = cache.layers[0].buffers[0]
    child, snapshot = cache.fork(), cache.snapshot()
    assert child.layers[0].buffers[0] is snapshot.layer_states[0][0][0] is buffer
    feed(cache, [2.0])
    assert cache.layers[0].buffers[0] is buffer
    feed(child, [3.0])
    assert child.layers[0].buffers[0] is not buffer


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_forks_never_see_each_other(options):
    parent = make_cache(**options)
    feed(parent, [1.0] * 10)
    caches = [parent, parent.fork(), parent.fork()]
    caches.append(caches[1].fork())
    histories = [[1.0] * 10 for _ in caches]
    for step in range(6):
        for index in (0, 2, 1, 3):
            new = [10.0 + index] * (1 + step % 3)
            got = feed(caches[index], new)
            if "global_dtype" not in options:
                assert got == expected(histories[index], new)
            assert got[1:3] == expected(histories[index], new)[1:3]
            histories[index] += new
            if step % 2:
                caches[index].crop(-1)
                histories[index].pop()
    caches[0].reset()
    assert seen_by(caches[3])[1:3] == expected(histories[3], [9.0])[1:3]


def test_deepcopy_is_independent():
    cache = make_cache()
    feed(cache, [1.0] * 10)
    child = copy.deepcopy(cache)
    feed(cache, [2.0])
    assert feed(child, [3.0]) == expected([1.0] * 10, [3.0])


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
@pytest.mark.parametrize("length", [0, 3, 30])
def test_save_then_load_is_the_same_cache(tmp_path, length, options):
    cache, path = make_cache(**options), tmp_path / "cache.safetensors"
    feed(cache, [float(i) for i in range(length)])
    cache.save(path)
    loaded = HybridCache.load(path, make_config())
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    assert (loaded.max_rollback, loaded.global_dtype) == (ROLLBACK, options.get("global_dtype"))
    assert loaded.offload_global == options.get("offload_global", False)
    assert seen_by(loaded) == seen_by(cache)
    if length:
        loaded.crop(-3)
        cache.crop(-3)
    assert feed(loaded, [5.0, 6.0]) == feed(cache, [5.0, 6.0])


@pytest.mark.parametrize("offload", [False, True])
def test_load_puts_storage_on_the_device_but_offloaded_layers_on_the_cpu(tmp_path, offload):
    cache = make_cache(offload_global=offload)
    feed(cache, [1.0] * 8)
    cache.save(tmp_path / "cache")
    loaded = HybridCache.load(tmp_path / "cache", make_config(), device="meta")
    assert [layer.buffers[0].device.type for layer in loaded.layers[:2]] == ["cpu" if offload else "meta", "meta"]


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"sliding_window": 7},
        {"head_dim": 8},
        {"swa_num_key_value_heads": 4},
        {"attention_value_scale": None},
        {"layer_types": ["full_attention"] * 4},
        {"rope_parameters": {"full_attention": {"rope_theta": 1}, "sliding_attention": {"rope_theta": 1}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_config_is_refused_by_name(tmp_path, change):
    cache, other, (name, value) = make_cache(), make_config(**change), next(iter(change.items()))
    cache.save(tmp_path / "cache")
    cache.check_config(make_config())
    with pytest.raises(ValueError, match=f"^HybridCache.*another config: {name} expected .*, got ") as error:
        cache.check_config(other)
    assert str(value) in str(error.value)
    with pytest.raises(ValueError, match=f"{cache_fingerprint(other)}.*{name} expected .*, got ") as error:
        HybridCache.load(tmp_path / "cache", other)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"^snapshot.*{name}"):
        cache.restore(HybridCache(other).snapshot())


def test_check_config_sees_a_config_changed_in_place():
    config = make_config()
    cache = HybridCache(config)
    config.rope_parameters["full_attention"]["rope_theta"] = 5
    with pytest.raises(ValueError, match="rope_parameters"):
        cache.check_config(config)


def test_fingerprint_is_the_same_for_equal_numbers_and_order():
    rope = {"sliding_attention": {"rope_theta": 10000}, "full_attention": {"rope_theta": 10000.0}}
    assert cache_fingerprint(make_config()) == cache_fingerprint(make_config(rope_parameters=rope))
    assert len(bytes.fromhex(cache_fingerprint(make_config()))) == 32


def test_damaged_files_give_one_line(tmp_path):
    path = tmp_path / "cache"
    with pytest.raises(FileNotFoundError):
        HybridCache.load(path, make_config())
    cache = make_cache()
    feed(cache, [1.0] * 30)
    cache.save(path)
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:5],
        whole[:100],
        whole[:-1],
        b"x" * len(whole),
        whole.replace(b"HybridCache", b"OtherCaches"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^[^\n]*cache: (expected a complete|format expected)[^\n]*$"):
            HybridCache.load(path, make_config())


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path, cache = tmp_path / "cache", make_cache()
    feed(cache, [1.0])
    cache.save(path)

    def broken(tensors, filename, metadata):
        open(filename, "w").close()
        raise OSError("disk full")

    monkeypatch.setattr("modeling_mimo.cache_mimo_v2.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert HybridCache.load(path, make_config()).get_seq_length() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_equals_the_reference_formula(dtype):
    cache = make_cache(global_dtype=FP8)
    keys = torch.randn(2, 1, 7, 6).to(dtype)
    keys[0, 0, 3] = 0
    got, _ = cache.update(keys, keys[..., :4].contiguous(), 0)
    scale = (keys.float().abs().amax(-1, keepdim=True) / 448).clamp_min(1e-37)
    assert got.dtype == dtype
    assert torch.equal(got, ((keys.float() / scale).to(FP8).float() * scale).to(dtype))
    # 3 mantissa bits: half a step is 1/16 of the value, or half the smallest subnormal (2**-10) times the scale
    assert (
        (got.float() - keys.float()).abs()
        <= keys.float().abs() / 16 + scale * 2**-10 + 0.01 * (dtype != torch.float32)
    ).all()


def test_nbytes_counts_what_is_allocated():
    sizes, fp8_sizes = [], []
    for options, out in (({}, sizes), ({"global_dtype": FP8}, fp8_sizes)):
        cache = make_cache(**options)
        feed(cache, [1.0] * 300)
        out.append(cache.nbytes())
    # 2 layers x 1 head x (6 + 4) x 4 bytes x (300 + 256) rows; 2 layers x 2 heads x 10 x 4 bytes x (6 + 2 * 4) rows
    assert sizes == [{"full_attention": 2 * 40 * 556, "sliding_attention": 2 * 2 * 40 * 14, "total": 44480 + 2240}]
    # a byte per number and two fp32 scales per token
    assert fp8_sizes[0]["full_attention"] == 2 * (10 + 8) * 556


def test_gradients_reach_the_new_states_and_stay_out_of_the_storage():
    cache = make_cache()
    for layer_idx in (0, 1):
        cache.update(*states_of([1.0] * 3, layer_idx), layer_idx)
        new = [s.clone().requires_grad_() for s in states_of([2.0] * 2, layer_idx)]
        keys, values = cache.update(*new, layer_idx)
        cache.update(*states_of([3.0], layer_idx), layer_idx)
        (keys.square().sum() + values.sum()).backward()
        assert torch.equal(new[0].grad, torch.full_like(new[0], 4.0))
        assert not cache.layers[layer_idx].buffers[0].requires_grad


@pytest.mark.parametrize("options", VARIANTS, ids=IDS)
def test_storage_made_in_inference_mode_can_be_written_outside_it(options):
    cache = make_cache(**options)
    with torch.inference_mode():
        feed(cache, [1.0] * 8)
        cache.reorder_cache(torch.tensor([0]))
        snapshot = cache.snapshot()
    feed(cache, [2.0])
    cache.restore(snapshot)
    assert feed(cache, [3.0])[1] == expected([1.0] * 8, [3.0])[1]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"layer_types": ["full_attention"]}, {}, "layer_types: expected 4 .* got"),
        ({"layer_types": ["chunked_attention"] * 4}, {}, "layer_types: expected 4 .* got .*chunked"),
        ({"sliding_window": 0}, {}, "sliding_window: expected at least 1 key, got 0"),
        ({}, {"max_rollback": -1}, "max_rollback: expected at least 0 tokens, got -1"),
        ({}, {"global_dtype": torch.int8}, "global_dtype: expected .*float8_e4m3fn.* got torch.int8"),
    ],
)
def test_wrong_arguments_are_named(config, options, message):
    with pytest.raises(ValueError, match=message):
        HybridCache(make_config(**config), **options)


# ---- inside a real model: Transformers' MiMoV2Flash, with DynamicCache as the oracle


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MiMoV2FlashConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "dense", "dense"],
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config.swa_num_key_value_heads, config.swa_head_dim, config.swa_v_head_dim = 2, 12, 8
    model = MiMoV2FlashForCausalLM(config).eval()
    for layer in model.model.layers:
        if layer.self_attn.sinks is not None:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def prompt(batch=1, length=23, period=None):
    ids = torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids if period is None else ids[:, torch.arange(length) % period]


@pytest.mark.parametrize("chunks", [[23], [1] * 23, [9, 9, 5], [2, 11, 1, 1, 8]])
@torch.no_grad()
def test_cached_and_chunked_equal_the_full_forward(model, chunks):
    ids, cache = prompt(2), HybridCache(model.config, max_rollback=ROLLBACK)
    full = model(ids, use_cache=False).logits
    parts = [model(part, **{CACHE_NAME: cache}).logits for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_left_padding_with_the_cache_equals_no_padding(model):
    ids, cache = prompt(), HybridCache(model.config)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(26) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(padded[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], **{CACHE_NAME: cache})
    last = model(padded[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(last[:, -1], model(ids, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rollback_in_the_model_equals_never_drafted(model):
    ids, cache = prompt(), HybridCache(model.config, max_rollback=ROLLBACK)
    model(ids[:, :15], **{CACHE_NAME: cache})
    for position in range(15, 22):
        model(torch.cat([ids[:, position : position + 1], prompt(1, 4)], 1), **{CACHE_NAME: cache})
        cache.crop(-4)
    last = model(ids[:, 22:], **{CACHE_NAME: cache}).logits[:, -1]
    torch.testing.assert_close(last, model(ids, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (2, {}),
        (2, {"prefill_chunk_size": 7}),
        (1, {"prompt_lookup_num_tokens": 3}),
        (2, {"num_beams": 3}),
        (2, {"num_beams": 2, "num_return_sequences": 2}),
    ],
    ids=["greedy", "chunked", "prompt_lookup", "beams", "beams_returned"],
)
def test_generate_equals_dynamic_cache(model, batch, options):
    ids = prompt(batch, period=7)
    settings = {"max_new_tokens": 24, "do_sample": False, **options}
    reference = model.generate(ids, **{CACHE_NAME: DynamicCache(config=model.config)}, **settings)
    cache = HybridCache(model.config, max_rollback=ROLLBACK)
    assert torch.equal(model.generate(ids, **{CACHE_NAME: cache}, **settings), reference)
    assert cache.get_seq_length() >= 23 + 24 - 1
    assert cache.layers[1].keys.shape[2] <= WINDOW - 1 + ROLLBACK
    assert not cache.is_compileable


def test_prompt_lookup_really_drafts_and_rolls_back(model, monkeypatch):
    crops, crop = [], HybridCache.crop
    monkeypatch.setattr(HybridCache, "crop", lambda self, n: crops.append(n) or crop(self, n))
    cache = HybridCache(model.config, max_rollback=ROLLBACK)
    model.generate(prompt(1, period=7), **{CACHE_NAME: cache}, max_new_tokens=24, prompt_lookup_num_tokens=3)
    assert min(crops) < 0


def test_generate_continues_from_a_fork_a_snapshot_and_a_file(model, tmp_path):
    prefix, ids = prompt(1, 15), prompt(1, 23)
    settings = {"max_new_tokens": 8, "do_sample": False}
    reference = model.generate(ids, **settings)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(prefix, **{CACHE_NAME: cache})
    snapshot = cache.snapshot()
    cache.save(tmp_path / "cache")
    for reused in (cache.fork(), HybridCache.load(tmp_path / "cache", model.config), cache):
        assert torch.equal(model.generate(ids, **{CACHE_NAME: reused}, **settings), reference)
    cache.restore(snapshot)
    assert torch.equal(model.generate(ids, **{CACHE_NAME: cache}, **settings), reference)
    json.dumps(cache.nbytes())
