"""The MTP heads over a whole sequence, against the naive page."""

import pytest
import torch
from mtp_reference import draft_logits
from reference import reference_hidden
from tiny import (
    LAYOUTS,
    SMALL,
    WINDOW,
    assert_near,
    page_weights,
    tiny_config,
    tiny_dict,
    tiny_model,
    token_ids,
    trunk_states,
)

from modeling_mimo import MiMoV2ForCausalLM, MiMoV2Model


pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 5 * WINDOW + 3
HEADS = [0, 1, 2]


def head_logits(model, ids, hidden, head, attention_mask=None):
    """[B, n, vocab] of `head` at every position whose token is known."""
    rows = ids.shape[1] - 1 - head
    embeddings, hidden = model.model.embed_tokens(ids[:, 1 + head :]), hidden[:, :rows]
    rotary = model.model.rotary_emb(hidden, torch.arange(rows)[None], "sliding_attention")
    layer = model.model.mtp.layers[head]
    mask = None if attention_mask is None else attention_mask[:, :rows]
    return model.lm_head(layer(embeddings, hidden, position_embeddings=rotary, attention_mask=mask))


@pytest.fixture(scope="module", params=LAYOUTS)
def scene(request):
    """A model, its weights for the page, a prompt, and the page's trunk states."""
    changes = {**SMALL, **LAYOUTS[request.param]}
    model, raw = tiny_model(**changes), tiny_dict(**changes)
    weights, ids = page_weights(model, raw), token_ids(2, LENGTH)
    return model, raw, weights, ids, reference_hidden(weights, raw, ids)


def expected_logits(scene, head):
    _, raw, weights, ids, hidden = scene
    return torch.stack([draft_logits(weights, raw, row, state, head) for row, state in zip(ids, hidden)])


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_draft_logits_of_a_head_equal_the_page_at_every_position(scene, head):
    model, _, _, ids, _ = scene
    hidden = trunk_states(model, ids)
    got, expected = head_logits(model, ids, hidden, head), expected_logits(scene, head)
    assert got.shape == (2, LENGTH - 1 - head, model.config.vocab_size)
    assert_near(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations(scene, implementation):
    model, _, _, ids, hidden = scene
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        assert_near(head_logits(model, ids, hidden, 1), expected_logits(scene, 1))
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def test_the_tolerance_sees_each_wrong_choice(scene):
    model, _, _, ids, hidden = scene
    expected, layer = expected_logits(scene, 0), model.model.mtp.layers[0]
    wrong = {
        "after the final norm": head_logits(model, ids, model.model.norm(hidden), 0),
        "a token too early": head_logits(model, torch.roll(ids, 1, dims=1), hidden, 0),
        "another head": head_logits(model, ids, hidden, 1),
    }
    weight = layer.eh_proj.weight.clone()
    layer.eh_proj.weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))
    wrong["hidden states before embeddings"] = head_logits(model, ids, hidden, 0)
    layer.eh_proj.weight.copy_(weight)
    assert_near(head_logits(model, ids, hidden, 0), expected)
    for what, got in wrong.items():
        difference = (got - expected[:, : got.shape[1]]).abs().amax(dim=-1)
        assert difference.median() > 0.1, what


@torch.no_grad()
def test_a_head_sees_its_own_window_and_no_more(scene):
    """Positions beyond the window before the last one change nothing, the one at its edge does."""
    model, _, _, ids, hidden = scene
    before = head_logits(model, ids, hidden, 0)[:, -1]
    rows = ids.shape[1] - 1
    for place, changes in ((rows - WINDOW - 1, False), (rows - WINDOW, True)):
        other = hidden.clone()
        other[:, place] += 1
        difference = (head_logits(model, ids, other, 0)[:, -1] - before).abs().max()
        assert (difference > 1e-4) == changes, place


@torch.no_grad()
def test_heads_take_padding_on_the_left(scene):
    model, raw, weights, ids, hidden = scene
    padding = 4
    padded = torch.cat((ids[:1], torch.cat((ids[1:, :1].expand(-1, padding), ids[1:, :-padding]), dim=1)))
    states = torch.cat((hidden[:1], torch.cat((torch.full_like(hidden[1:, :padding], 9), hidden[1:, :-padding]), 1)))
    mask = torch.ones_like(padded)
    mask[1, :padding] = 0
    got = head_logits(model, padded, states, 1, mask)
    assert_near(got[0], draft_logits(weights, raw, ids[0], hidden[0], 1))
    # what counts between two positions is their distance
    rest = draft_logits(weights, raw, ids[1, :-padding], hidden[1, :-padding], 1)
    assert_near(got[1, padding:], rest)


def test_the_trunk_gives_its_states_before_the_norm():
    model, ids, raw = tiny_model(**SMALL), token_ids(2, 9), tiny_dict(**SMALL)
    states = trunk_states(model, ids)
    assert torch.equal(model.model.norm(states), model.model(ids).last_hidden_state)
    assert_near(states, reference_hidden(page_weights(model, raw), raw, ids))


def test_the_trunk_does_not_run_the_heads():
    model, ids = tiny_model(**SMALL), token_ids(2, 9)
    without = MiMoV2ForCausalLM(tiny_config(**SMALL, load_mtp=False)).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mtp." not in name}
    assert without.load_state_dict(state).missing_keys == []
    options = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    for got, expected in ((model(ids, **options), without(ids, **options)), (model.model(ids), without.model(ids))):
        assert got.keys() == expected.keys()
        for name in ("hidden_states", "attentions", "router_logits"):
            assert len(got.get(name) or ()) == len(expected.get(name) or ())
        first = got.logits if "logits" in got else got.last_hidden_state
        assert torch.equal(first, expected.logits if "logits" in got else expected.last_hidden_state)


@pytest.mark.parametrize(("changes", "heads"), [({}, 3), ({"num_nextn_predict_layers": 1}, 1)])
def test_a_model_has_the_heads_of_its_config(changes, heads):
    assert len(MiMoV2Model(tiny_config(**SMALL, **changes)).mtp.layers) == heads


@pytest.mark.parametrize("changes", [{"num_nextn_predict_layers": 0}, {"load_mtp": False}])
def test_a_model_without_heads(changes):
    assert MiMoV2Model(tiny_config(**SMALL, **changes)).mtp is None


def test_heads_in_a_trunk_of_global_layers():
    changes = {**SMALL, "hybrid_layer_pattern": [0] * 4}
    model, raw, ids = tiny_model(**changes), tiny_dict(**changes), token_ids(1, LENGTH)
    weights, hidden = page_weights(model, raw), trunk_states(model, ids)
    assert_near(head_logits(model, ids, hidden, 2)[0], draft_logits(weights, raw, ids[0], hidden[0], 2))


def test_gradients_reach_every_parameter_of_a_head():
    model, ids = tiny_model(**SMALL), token_ids(2, LENGTH)
    model.activation_checkpointing_enable()
    model.train()
    head_logits(model, ids, trunk_states(model, ids), 1).square().mean().backward()
    for name, parameter in model.named_parameters():
        expected = ".mtp.layers.1." in name
        if ".mtp." in name:
            assert (parameter.grad is not None and bool(parameter.grad.any())) == expected, name


def test_new_heads_start_with_sinks_of_zero():
    heads = MiMoV2ForCausalLM(tiny_config(**SMALL)).model.mtp.layers
    assert all(not head.self_attn.attention_sink_bias.any() for head in heads)
