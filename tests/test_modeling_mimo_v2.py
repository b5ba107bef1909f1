"""The model against the naive page and against Transformers' own class, and its invariants."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import reference_hidden, reference_logits, rms_norm, route
from tiny import (
    LAYOUTS,
    SMALL,
    TINY,
    WINDOW,
    assert_near,
    page_weights,
    randomize,
    tiny_config,
    tiny_dict,
    tiny_model,
    token_ids,
    transformers_twin,
)
from transformers import DynamicCache, StaticCache

from modeling_mimo import HybridCache, MiMoV2ForCausalLM, MiMoV2Model


pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 50
IMPLEMENTATIONS = ("eager", "sdpa")
# no end token: every run has the same length
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 16}

# every variation keeps a page, `None` keeps the released value
VARIATIONS = {
    "released": {},
    "swa_shapes_of_their_own": {
        "swa_num_attention_heads": 6,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 12,
    },
    "sinks_in_global_layers": {"add_full_attention_sink_bias": True},
    "no_sinks": {"add_swa_attention_sink_bias": False},
    "weights_not_normalized": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "expert_groups": {"n_group": 4, "topk_group": 2},
    "one_expert_group": {"n_group": 2, "topk_group": 1},
    "window_of_one": {"sliding_window": 1, "sliding_window_size": 1},
    "tied_embeddings": {"tie_word_embeddings": True},
    "sliding_and_sparse_first": {
        "hybrid_layer_pattern": [1, 0, 1, 1, 1, 1, 0],
        "moe_layer_freq": [1, 0, 1, 1, 1, 0, 1],
    },
}


@pytest.fixture(scope="module")
def model():
    """Shared and read only; a test that changes its model makes one of its own."""
    return tiny_model()


@pytest.fixture(scope="module")
def full(model):
    """Logits of `token_ids()` without cache and padding."""
    with torch.no_grad():
        return model(token_ids(), use_cache=False).logits


@pytest.fixture
def small():
    return tiny_model(**SMALL)


# Against other implementations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_equal_the_naive_page(layout, implementation):
    raw = tiny_dict(**LAYOUTS[layout])
    model = tiny_model(**LAYOUTS[layout])
    model.set_attn_implementation(implementation)
    expected = reference_logits(page_weights(model, raw), raw, token_ids())
    # large enough for 1e-4 to mean something
    assert expected.std() > 0.5
    assert_near(model(token_ids()).logits, expected)


@pytest.mark.parametrize("variation", VARIATIONS)
@torch.no_grad()
def test_variations_equal_the_naive_page(variation):
    raw = tiny_dict(**VARIATIONS[variation])
    model = tiny_model(**VARIATIONS[variation])
    assert_near(model(token_ids()).logits, reference_logits(page_weights(model, raw), raw, token_ids()))


@torch.no_grad()
def test_the_three_layouts_of_the_same_rows_are_three_different_models():
    fused = {layout: tiny_model(**LAYOUTS[layout]) for layout in ("chunked", "plain")}
    assert torch.equal(
        fused["chunked"].model.layers[0].self_attn.qkv_proj.weight,
        fused["plain"].model.layers[0].self_attn.qkv_proj.weight,
    )
    logits = [model(token_ids()).logits for model in fused.values()]
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize("counts_query", [True, False], ids=["128", "129"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_equal_transformers_own_class(layout, counts_query):
    raw = tiny_dict(**LAYOUTS[layout], sliding_window_includes_query=counts_query)
    model = tiny_model(**LAYOUTS[layout], sliding_window_includes_query=counts_query)
    twin = transformers_twin(model, raw, sliding_window=WINDOW if counts_query else WINDOW + 1)
    assert_near(model(token_ids()).logits, twin(token_ids()).logits)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got, expected = (one(token_ids(), attention_mask=mask, position_ids=positions).logits for one in (model, twin))
    assert_near(got[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_the_two_readings_of_the_window_differ(full):
    assert (tiny_model(sliding_window_includes_query=False)(token_ids()).logits - full).abs().max() > 0.01


@torch.no_grad()
def test_base_model_ends_with_the_final_norm(model):
    raw, weights = tiny_dict(), page_weights(model, tiny_dict())
    hidden = model.model(token_ids()).last_hidden_state
    assert_near(hidden, rms_norm(reference_hidden(weights, raw, token_ids()), weights["model.norm.weight"], raw))


@torch.no_grad()
def test_bfloat16_follows_the_page():
    # all experts chosen: rounding cannot flip a choice
    raw = tiny_dict(num_experts_per_tok=8)
    model = tiny_model(num_experts_per_tok=8)
    expected = reference_logits(page_weights(model, raw), raw, token_ids())
    logits = model.to(torch.bfloat16)(token_ids()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.03


# Cache, chunks and padding ----------------------------------------------------------------------------------------


def caches(config):
    return {
        "none_given": None,
        "hybrid": HybridCache(config),
        "hybrid_without_rollback": HybridCache(config, max_rollback=0),
        "dynamic": DynamicCache(config=config),
        "dynamic_without_config": DynamicCache(),
        "static": StaticCache(config=config, max_cache_len=LENGTH),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cache", ["none_given", "hybrid", "hybrid_without_rollback", "dynamic", "static"])
@pytest.mark.parametrize("chunks", [[1] * 12, [20, 15, 1, 1, 13], [3, WINDOW - 1, WINDOW, WINDOW + 1, 23]], ids=str)
@torch.no_grad()
def test_cached_and_chunked_equal_the_full_forward(model, full, chunks, cache, implementation):
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    past, parts = caches(model.config)[cache], []
    for part in token_ids()[:, : sum(chunks)].split(chunks, dim=1):
        output = model(part, cache=past, use_cache=True)
        past = output.cache
        parts.append(output.logits)
    assert_near(torch.cat(parts, dim=1), full[:, : sum(chunks)])
    assert past.get_seq_length() == sum(chunks)


@torch.no_grad()
def test_a_transformers_cache_without_config_keeps_all_keys_and_is_right_too(model, full):
    past = DynamicCache()
    parts = [model(part, cache=past).logits for part in token_ids().split([20, 29, 1], dim=1)]
    assert_near(torch.cat(parts, dim=1), full)


@torch.no_grad()
def test_no_cache_is_made_unless_asked_for(model):
    assert model(token_ids(), use_cache=False).cache is None
    assert isinstance(model(token_ids(), use_cache=True).cache, HybridCache)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_positions", [True, False])
@torch.no_grad()
def test_left_and_right_padding_equal_no_padding(model, full, with_positions, implementation):
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    ids, left, right = token_ids(), 13, 10
    padded = torch.cat([torch.zeros(2, left, dtype=torch.long), ids, torch.zeros(2, right, dtype=torch.long)], dim=1)
    mask = torch.zeros_like(padded)
    mask[:, left : left + LENGTH] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if with_positions else None
    # without positions every token turns by 13 more, and rotary embedding is relative
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    assert_near(logits[:, left : left + LENGTH], full)
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_rows_padded_differently_with_a_cache_in_chunks(model, full):
    ids, lengths = token_ids(), (LENGTH, 31)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        padded[row, LENGTH - length :] = ids[row, :length]
        mask[row, LENGTH - length :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past, parts = HybridCache(model.config), []
    for start, stop in ((0, 10), (10, 25), (25, 48), (48, 49), (49, 50)):
        output = model(
            padded[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            cache=past,
        )
        parts.append(output.logits)
    logits = torch.cat(parts, dim=1)
    for row, length in enumerate(lengths):
        assert_near(logits[row, LENGTH - length :], full[row, :length])
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_fully_padded_rows_are_finite_and_leave_the_others_alone(model, full, implementation):
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0] = 0
    logits = model(token_ids(), attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    assert_near(logits[1], full[1])
    assert torch.isfinite(model(token_ids(), attention_mask=torch.zeros_like(mask)).logits).all()


@pytest.mark.parametrize("kind", ["bool", "additive"])
@torch.no_grad()
def test_a_4d_mask_is_taken_as_it_is(model, full, kind):
    """A block mask over two documents equals running the documents alone."""
    position = torch.arange(LENGTH)
    visible = position[None, :] <= position[:, None]
    visible &= (position[:, None] < 20) == (position[None, :] < 20)
    # Transformers hands the same 4-D mask to both layer types, so the window has to be wide open
    model = tiny_model(sliding_window=64, sliding_window_size=64)
    mask = visible[None, None].expand(2, 1, -1, -1)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None].expand(2, -1)
    logits = model(token_ids(), attention_mask=mask, position_ids=positions).logits
    assert_near(logits[:, :20], model(token_ids()[:, :20]).logits)
    assert_near(logits[:, 20:], model(token_ids()[:, 20:]).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(model, implementation):
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    lengths = [21, 5, 24]
    packed, positions = token_ids(1), torch.cat([torch.arange(length) for length in lengths])[None]
    parts = model(packed, position_ids=positions).logits.split(lengths, dim=1)
    for part, ids in zip(parts, packed.split(lengths, dim=1)):
        assert_near(part, model(ids).logits)


# Generation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy(model):
    """Prompt and its greedy continuation without any cache, on the eager path."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    # a repetitive prompt, so that prompt lookup finds something to draft
    prompt = token_ids(2, 7)[:, torch.arange(21) % 7]
    return prompt, model.generate(prompt, use_cache=False, **GREEDY)


GENERATION = {
    "default": lambda config: {},
    "hybrid": lambda config: {"cache": HybridCache(config)},
    "hybrid_offloaded": lambda config: {"cache": HybridCache(config, offload_global=True)},
    "dynamic": lambda config: {"cache": DynamicCache(config=config)},
    "dynamic_by_name": lambda config: {"cache_implementation": "dynamic"},
    "static": lambda config: {"cache_implementation": "static"},
    "prefill_chunks": lambda config: {"prefill_chunk_size": 6},
    "prefill_chunks_dynamic": lambda config: {"prefill_chunk_size": 6, "cache": DynamicCache(config=config)},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("way", GENERATION)
def test_greedy_tokens_do_not_depend_on_the_cache(model, greedy, way, implementation):
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    prompt, expected = greedy
    assert torch.equal(model.generate(prompt, **GENERATION[way](model.config), **GREEDY), expected)


def test_generate_makes_a_hybrid_cache(model, greedy):
    output = model.generate(greedy[0], return_dict_in_generate=True, **GREEDY)
    assert isinstance(output.cache, HybridCache)
    assert output.cache.layers[1].keys.shape[2] < 21 + GREEDY["max_new_tokens"] + WINDOW
    assert not isinstance(
        model.generate(greedy[0], return_dict_in_generate=True, cache_implementation="static", **GREEDY).cache,
        HybridCache,
    )


def test_generate_with_left_padding_equals_no_padding(model, greedy):
    prompt, expected = greedy
    padded = torch.cat([torch.zeros(2, 9, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(30) >= 9).long()[None].repeat(2, 1)
    # one row padded less: its own first tokens stand where the other row has padding
    padded[1, 2:23], padded[1, 23:], mask[1] = prompt[1], expected[1, 21:28], (torch.arange(30) >= 2).long()
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}, {"use_cache": False}):
        output = model.generate(padded, attention_mask=mask, **options, **GREEDY)
        assert torch.equal(output[0, 30:], expected[0, 21:])
        assert torch.equal(output[1, 30:39], expected[1, 28:])


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beam_search_equals_dynamic_cache(model, greedy, beams):
    options = {**GREEDY, **beams, "max_new_tokens": 10}
    expected = model.generate(greedy[0], cache=DynamicCache(config=model.config), **options)
    assert torch.equal(model.generate(greedy[0], cache=HybridCache(model.config), **options), expected)
    assert torch.equal(model.generate(greedy[0], **options), expected)


def test_prompt_lookup_equals_greedy_and_really_rolls_back(model, greedy, monkeypatch):
    crops, crop = [], HybridCache.crop
    monkeypatch.setattr(HybridCache, "crop", lambda self, n: crops.append(n) or crop(self, n))
    prompt, expected = greedy
    assert torch.equal(model.generate(prompt[:1], prompt_lookup_num_tokens=3, **GREEDY), expected[:1])
    assert min(crops) < 0


def test_an_assistant_model_equals_greedy(model, greedy):
    assistant = tiny_model(seed=5, **SMALL)
    prompt, expected = greedy
    assert torch.equal(model.generate(prompt[:1], assistant_model=assistant, **GREEDY), expected[:1])


@pytest.mark.parametrize("kind", ["hybrid", "dynamic"])
def test_several_calls_on_one_cache_equal_one_call_on_the_concatenation(model, kind):
    cache, text = caches(model.config)[kind], token_ids(1, 11)
    for turn in range(3):
        with_cache = model.generate(text, cache=cache, **GREEDY)
        assert torch.equal(with_cache, model.generate(text, use_cache=False, **GREEDY))
        text = torch.cat([with_cache, token_ids(1, 7, seed=turn + 10)], dim=1)


def test_generate_from_embeddings_equals_generate_from_ids(model, greedy):
    prompt, expected = greedy
    embeds = model.get_input_embeddings()(prompt)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected[:, prompt.shape[1] :])


@torch.no_grad()
def test_snapshot_restore_and_fork_equal_recomputing(model, full):
    ids, cache = token_ids(), HybridCache(model.config)
    model(ids[:, :20], cache=cache)
    snapshot, fork = cache.snapshot(), cache.fork()
    other = token_ids(seed=9)[:, :15]
    expected_other = model(torch.cat([ids[:, :20], other], dim=1)).logits[:, 20:]
    assert_near(model(other, cache=cache).logits, expected_other)
    # the branches do not see each other
    assert_near(model(ids[:, 20:], cache=fork).logits, full[:, 20:])
    for _ in range(2):
        cache.restore(snapshot)
        parts = [model(part, cache=cache).logits for part in ids[:, 20:].split([1, 14, 15], dim=1)]
        assert_near(torch.cat(parts, dim=1), full[:, 20:])


@torch.no_grad()
def test_rollback_in_the_model_equals_never_drafted(model, full):
    ids, cache = token_ids(), HybridCache(model.config, max_rollback=4)
    model(ids[:, :20], cache=cache)
    for position in range(20, 30):
        step = torch.cat([ids[:, position : position + 1], token_ids(2, 4, seed=position)], dim=1)
        assert_near(model(step, cache=cache).logits[:, 0], full[:, position])
        cache.crop(-4)


# Inputs and outputs -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_equal_ids(model, full):
    embeds = model.get_input_embeddings()(token_ids())
    assert torch.equal(model(inputs_embeds=embeds).logits, full)


@torch.no_grad()
def test_logits_to_keep(model, full):
    assert_near(model(token_ids(), logits_to_keep=3).logits, full[:, -3:], 1e-5)
    assert_near(model(token_ids(), logits_to_keep=torch.tensor([4, 9])).logits, full[:, [4, 9]], 1e-5)


@torch.no_grad()
def test_loss_is_the_shifted_cross_entropy(model, full):
    labels = token_ids().clone()
    labels[0, :20] = -100
    expected = F.cross_entropy(full[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_near(model(token_ids(), labels=labels).loss, expected, 1e-5)
    total = F.cross_entropy(full[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    assert_near(model(token_ids(), labels=labels, num_items_in_batch=100).loss, total / 100, 1e-5)


@torch.no_grad()
def test_recorded_outputs(model, full):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(token_ids(), output_hidden_states=True, output_attentions=True, output_router_logits=True)
    layers, sparse = TINY["num_hidden_layers"], sum(TINY["moe_layer_freq"])
    assert_near(output.logits, full)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, LENGTH, 64)] * (layers + 1)
    assert_near(eager.lm_head(output.hidden_states[-1]), full)
    assert torch.equal(output.hidden_states[0], eager.get_input_embeddings()(token_ids()))
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 8, LENGTH, LENGTH)] * layers
    assert [tuple(logits.shape) for logits in output.router_logits] == [(2 * LENGTH, 8)] * sparse
    # sinks take a share in sliding layers only
    totals = [weights.sum(-1) for weights in output.attentions]
    for code, total in zip(TINY["hybrid_layer_pattern"], totals):
        assert (total < 0.999).any() if code else torch.allclose(total, torch.ones_like(total))
    plain = model(token_ids())
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert plain.router_logits is None


def test_tuple_output(model, full):
    with torch.no_grad():
        assert torch.equal(model(token_ids(), return_dict=False)[0], full)


@pytest.mark.parametrize(
    "name", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "nonsense"]
)
def test_kernels_that_would_drop_the_sinks_are_refused(small, name):
    with pytest.raises(ValueError, match=r"attn_implementation.*sdpa.*eager.*flash_attention_4.*got '") as error:
        small.set_attn_implementation(name)
    assert name in str(error.value)
    assert small.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="attn_implementation"):
        MiMoV2ForCausalLM._from_config(tiny_config(**SMALL), attn_implementation=name)


def test_sdpa_is_the_default(small):
    assert small.config._attn_implementation == "sdpa"


def test_both_or_neither_input_is_refused(small):
    embeds = small.get_input_embeddings()(token_ids())
    for arguments in ({}, {"input_ids": token_ids(), "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match=r"`input_ids`, `inputs_embeds`: expected exactly one"):
            small(**arguments)


@pytest.mark.parametrize("shape", [(2, 49), (2, 51), (1, 50), (3, 50), (50,)], ids=str)
def test_a_mask_of_another_shape_is_refused(small, shape):
    with pytest.raises(ValueError, match=r"`attention_mask`: expected .*\[2, 50\], got"):
        small(token_ids(), attention_mask=torch.ones(shape, dtype=torch.long))


def test_a_mask_that_forgets_the_cached_tokens_is_refused(small):
    cache = HybridCache(small.config)
    small(token_ids(), cache=cache)
    with pytest.raises(ValueError, match=r"`attention_mask`: expected .*\[2, 51\], got \[2, 1\]"):
        small(token_ids(2, 1), cache=cache, attention_mask=torch.ones(2, 1, dtype=torch.long))


def test_a_context_beyond_the_positions_is_refused():
    model = tiny_model(**SMALL, max_position_embeddings=16)
    with torch.no_grad():
        model(token_ids(1, 16))
        with pytest.raises(ValueError, match=r"max_position_embeddings=16 tokens, got 0 cached \+ 17 new"):
            model(token_ids(1, 17))
        cache = HybridCache(model.config)
        model(token_ids(1, 14), cache=cache)
        with pytest.raises(ValueError, match=r"max_position_embeddings=16 tokens, got 14 cached \+ 3 new"):
            model(token_ids(1, 3), cache=cache)
        # refused before anything was stored
        assert cache.get_seq_length() == 14


def test_a_cache_of_another_config_is_refused(small):
    for change in ({"sliding_window": 9, "sliding_window_size": 9}, {"swa_rope_theta": 20000}):
        cache = HybridCache(tiny_config(**{**SMALL, **change}))
        with pytest.raises(ValueError, match="HybridCache was made for another config: "):
            small(token_ids(), cache=cache)


# Training ---------------------------------------------------------------------------------------------------------


def gradients(model, **inputs):
    model.train()
    model.zero_grad()
    model(labels=inputs["input_ids"], **inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_reach_every_parameter():
    # every expert is chosen
    model = tiny_model(**SMALL, num_experts_per_tok=8)
    got = gradients(model, input_ids=token_ids())
    # the trunk does not run the MTP heads
    assert got.keys() == {name for name, _ in model.named_parameters() if ".mtp." not in name}
    for name, gradient in got.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 1e-7, name
    assert sum("attention_sink_bias" in name for name in got) == 2
    assert sum(name.endswith("mlp.gate.weight") for name in got) == 3
    for name in ("gate_up_proj", "down_proj"):
        assert got[f"model.layers.1.mlp.experts.{name}"].abs().amax((1, 2)).min() > 0


def test_gradients_of_both_paths_are_equal_with_padding(small):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :13], mask[1, 44:] = 0, 0
    eager = copy.deepcopy(small)
    eager.set_attn_implementation("eager")
    got, expected = (gradients(m, input_ids=token_ids(), attention_mask=mask) for m in (small, eager))
    for name, gradient in expected.items():
        assert_near(got[name], gradient, 1e-5)


def test_gradients_equal_those_of_the_naive_page(small):
    raw = tiny_dict(**SMALL)
    got = gradients(small, input_ids=token_ids())
    for parameter in small.parameters():
        parameter.grad = None
    weights = page_weights(small, raw)
    names = [
        name
        for name in weights
        if ".mtp." not in name
        and name.endswith(
            ("q_proj.weight", "attention_sink_bias", "mlp.gate.weight", "norm.weight", "experts.0.up_proj.weight")
        )
    ]
    leaves = {name: weights[name].detach().clone().requires_grad_() for name in names}
    logits = reference_logits({**weights, **leaves}, raw, token_ids())
    F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids()[:, 1:].flatten()).backward()
    for name, leaf in leaves.items():
        if name.endswith("q_proj.weight"):
            # chunk c of the fused rows begins with the query heads of KV head c
            fused = (
                got[name.replace("q_proj", "qkv_proj")].unflatten(0, (2, -1))[:, : leaf.shape[0] // 2].flatten(0, 1)
            )
            assert_near(fused, leaf.grad, 1e-5)
        elif ".experts.0." in name:
            stacked = got[name.replace("0.up_proj.weight", "gate_up_proj")][0]
            assert_near(stacked[TINY["moe_intermediate_size"] :], leaf.grad, 1e-5)
        else:
            assert_near(got[name], leaf.grad, 1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(small):
    expected = gradients(small, input_ids=token_ids())
    small.activation_checkpointing_enable()
    calls, layer = [], small.model.layers[1].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(small, input_ids=token_ids())
    # forward and recomputation
    assert len(calls) == 2
    for name, gradient in expected.items():
        assert_near(got[name], gradient, 1e-6)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_gradient_checkpointing_leaves_a_cache_empty(small, name):
    """Layers that run twice would append twice, and attention see every token twice in the second run."""
    expected = gradients(small, input_ids=token_ids())
    small.activation_checkpointing_enable()
    cache = HybridCache(small.config)
    got = gradients(small, input_ids=token_ids(), **{name: cache})
    assert cache.get_seq_length() == 0
    for key, gradient in expected.items():
        assert_near(got[key], gradient, 1e-6)
    with torch.no_grad():
        small(token_ids(), **{name: cache})
    assert cache.get_seq_length() == token_ids().shape[1]
    with pytest.raises(ValueError, match=r"`cache`: expected none in gradient checkpointing, got \d+ cached tokens"):
        small(token_ids(), **{name: cache})


def test_a_few_steps_of_training_lower_the_loss(small):
    optimizer = torch.optim.AdamW(small.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        losses.append(small(token_ids(), labels=token_ids()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


# Router and experts -----------------------------------------------------------------------------------------------


def moe_layer(**changes):
    """Router, experts and page weights of one sparse layer."""
    raw = tiny_dict(**SMALL, **changes)
    model = tiny_model(**SMALL, **changes)
    return raw, model.model.layers[1].mlp, page_weights(model, raw)


def spread(router_output, experts=8):
    """weights [tokens, k], indices [tokens, k] -> [tokens, experts], as the page's `route` gives them."""
    _, weights, indices = router_output
    return torch.zeros(len(weights), experts).scatter(1, indices, weights)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_router_dtype": "bfloat16"},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 2, "topk_group": 1},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"num_experts_per_tok": 8},
    ],
    ids=str,
)
@torch.no_grad()
def test_router_equals_the_page(changes):
    raw, layer, weights = moe_layer(**changes)
    tokens = torch.randn(200, 64)
    got, expected = spread(layer.gate(tokens)), route(tokens, weights, "model.layers.1.mlp.", raw)
    assert (got > 0).sum(-1).eq(raw["num_experts_per_tok"]).all()
    if changes.get("moe_router_dtype") == "bfloat16":
        # here the product is rounded to bfloat16 too, which may flip a near tie
        same = ((got > 0) == (expected > 0)).all(-1)
        assert same.float().mean() > 0.95
        assert_near(got[same], expected[same], 0.01)
    else:
        assert_near(got, expected, 1e-6)


@torch.no_grad()
def test_the_router_computes_in_the_configured_dtype():
    tokens = torch.randn(200, 64)
    _, exact, weights = moe_layer()
    _, rounded, _ = moe_layer(moe_router_dtype="bfloat16")
    gate = weights["model.layers.1.mlp.gate.weight"]
    assert_near(exact.gate(tokens)[0], tokens @ gate.T, 1e-5)
    expected = F.linear(tokens.bfloat16(), gate.bfloat16()).float()
    assert torch.equal(rounded.gate(tokens)[0], expected)
    assert (expected - tokens @ gate.T).abs().max() > 1e-3
    # a bfloat16 model keeps the float32 product
    half = exact.gate(tokens.bfloat16())[0]
    assert half.dtype == torch.float32
    assert_near(half, tokens.bfloat16().float() @ gate.T, 1e-5)


@torch.no_grad()
def test_the_correction_bias_selects_and_never_weighs():
    _, layer, _ = moe_layer(norm_topk_prob=False)
    gate, tokens = layer.gate, torch.randn(100, 64)
    gate.e_score_correction_bias.zero_()
    scores = gate(tokens)[0].sigmoid()
    gate.e_score_correction_bias[3] = 100.0
    _, weights, indices = gate(tokens)
    assert (indices == 3).any(-1).all()
    assert_near(weights, scores.gather(1, indices), 1e-6)
    # a shift of every bias changes nothing
    gate.e_score_correction_bias.zero_()
    before = spread(gate(tokens))
    gate.e_score_correction_bias.fill_(0.37)
    assert_near(spread(gate(tokens)), before, 1e-6)


@torch.no_grad()
def test_only_the_best_groups_are_chosen_from():
    _, layer, _ = moe_layer(n_group=4, topk_group=1)
    gate = layer.gate
    gate.e_score_correction_bias.zero_()
    gate.e_score_correction_bias[4:6] = 5.0
    _, _, indices = gate(torch.randn(50, 64))
    assert set(indices.flatten().tolist()) == {4, 5}


@pytest.mark.parametrize("tokens", [1, 3, 200])
@torch.no_grad()
def test_experts_equal_the_written_out_sum(tokens):
    _, layer, weights = moe_layer()
    states = torch.randn(tokens, 64)
    _, share, indices = layer.gate(states)
    expected = torch.zeros_like(states)
    for token in range(tokens):
        for weight, expert in zip(share[token], indices[token].tolist()):
            gate, up, down = (
                weights[f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
            x = states[token]
            expected[token] += weight * (down @ (F.silu(gate @ x) * (up @ x)))
    assert_near(layer.experts(states, indices, share), expected, 1e-5)


@torch.no_grad()
def test_an_index_of_another_rank_adds_nothing():
    _, layer, _ = moe_layer()
    states = torch.randn(5, 64)
    _, share, indices = layer.gate(states)
    foreign = indices.clone()
    foreign[:, 1] = 8
    alone = share.clone()
    alone[:, 1] = 0
    assert_near(layer.experts(states, foreign, share), layer.experts(states, indices, alone), 1e-6)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_interchangeable_experts_give_the_same_numbers(model, full, implementation):
    model = copy.deepcopy(model)
    assert model.config._experts_implementation == "eager"
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    with torch.no_grad():
        assert_near(model(token_ids()).logits, full)


# Construction -----------------------------------------------------------------------------------------------------


def test_fresh_weights_are_finite_and_of_the_configured_width():
    model = MiMoV2ForCausalLM(tiny_config(initializer_range=0.05))
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    layer = model.model.layers[1]
    for tensor in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
        assert 0.04 < tensor.std() < 0.06
    assert layer.self_attn.attention_sink_bias.eq(0).all()
    assert layer.mlp.gate.e_score_correction_bias.eq(0).all()


def test_rotary_tables_are_those_of_each_layer_type(model):
    rotary = model.model.rotary_emb
    for layer_type, theta in (("full_attention", 1e7), ("sliding_attention", 1e4)):
        expected = [theta ** (-2 * index / 8) for index in range(4)]
        assert_near(getattr(rotary, f"{layer_type}_inv_freq"), torch.tensor(expected), 1e-8)
    # a cast of the model must not touch the frequencies for long contexts
    assert rotary(torch.zeros(1), torch.tensor([[100000]]), "sliding_attention")[0].dtype == torch.float32


def test_resize_and_accessors(small):
    assert small.get_input_embeddings() is small.model.embed_tokens
    assert small.get_output_embeddings() is small.lm_head
    small.resize_token_embeddings(330)
    assert small.config.vocab_size == small.lm_head.weight.shape[0] == 330


def test_deterministic(model):
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, model(token_ids()).logits)


def test_base_model_alone():
    base = randomize(MiMoV2Model(tiny_config(**SMALL)).eval())
    with torch.no_grad():
        assert base(token_ids()).last_hidden_state.shape == (2, LENGTH, 64)
