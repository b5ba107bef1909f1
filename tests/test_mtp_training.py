"""Training the MTP heads: their losses are those of the tokens they draft, beside the trunk or on a frozen one."""

import math

import pytest
import torch
import torch.nn.functional as F
from mtp_reference import draft_logits
from reference import reference_hidden
from tiny import SIGHT, SMALL, WINDOW, page_weights, sight_model, tiny_dict, tiny_model, token_ids

from modeling_mimo import HybridCache, MiMoV2ForCausalLM


pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 3 * WINDOW + 2


@pytest.fixture(scope="module")
def scene():
    model, raw = tiny_model(**SMALL), tiny_dict(**SMALL)
    return model, raw, page_weights(model, raw)


def page_sums(scene, ids, labels):
    """Per head the sum of the losses on the page, and how many tokens it goes over, for one sequence [S]."""
    _, raw, weights = scene
    hidden = reference_hidden(weights, raw, ids[None])[0]
    sums = []
    for head in range(3):
        targets = labels[2 + head :]
        logits = draft_logits(weights, raw, ids, hidden, head)[: len(targets)]
        counts = int((targets != -100).sum())
        sums.append((float(F.cross_entropy(logits, targets, reduction="sum")) if counts else 0.0, counts))
    return sums


def assert_losses(output, sums):
    """`sums`: what `page_sums` gives for each sequence of the batch."""
    assert len(output.mtp_losses) == 3
    for loss, parts in zip(output.mtp_losses, zip(*sums)):
        expected = sum(value for value, _ in parts) / sum(count for _, count in parts)
        assert math.isclose(float(loss), expected, rel_tol=1e-4)


@torch.no_grad()
def test_losses_are_those_of_the_tokens_that_the_heads_draft(scene):
    model, ids = scene[0], token_ids(2, LENGTH)
    labels = ids.clone()
    labels[0, :9] = labels[1, 5] = -100
    output = model(ids, labels=labels, mtp_loss_weight=0.3)
    assert_losses(output, [page_sums(scene, *pair) for pair in zip(ids, labels)])
    plain = model(ids, labels=labels)
    assert plain.mtp_losses is None
    assert torch.equal(plain.logits, output.logits)
    assert math.isclose(float(output.loss), float(plain.loss + 0.3 * sum(output.mtp_losses)), rel_tol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss(scene, side):
    model, ids, padding = scene[0], token_ids(2, LENGTH), 5
    mask = torch.ones_like(ids)
    empty = slice(0, padding) if side == "left" else slice(LENGTH - padding, LENGTH)
    mask[1, empty] = 0
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels, mtp_loss_weight=1.0)
    rest = ids[1][mask[1] == 1]
    assert_losses(output, [page_sums(scene, ids[0], ids[0]), page_sums(scene, rest, rest)])


@torch.no_grad()
def test_shifted_labels_are_as_good_as_labels(scene):
    model, ids = scene[0], token_ids(2, LENGTH)
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    expected = model(ids, labels=ids, mtp_loss_weight=0.3)
    # labels that are shifted already take the place of the others
    got = model(ids, labels=token_ids(2, LENGTH, seed=6), shift_labels=shifted, mtp_loss_weight=0.3)
    assert torch.equal(got.loss, expected.loss)
    assert all(torch.equal(*pair) for pair in zip(got.mtp_losses, expected.mtp_losses))


@torch.no_grad()
def test_a_head_is_not_asked_for_tokens_of_the_next_packed_sequence(scene):
    model, ids, border = scene[0], token_ids(1, LENGTH), 11
    positions = torch.cat((torch.arange(border), torch.arange(LENGTH - border)))[None]
    output = model(ids, position_ids=positions, labels=ids, mtp_loss_weight=1.0)
    parts = [ids[0, :border], ids[0, border:]]
    assert_losses(output, [page_sums(scene, part, part) for part in parts])


@torch.no_grad()
def test_a_sequence_too_short_for_a_head_has_no_loss_of_it(scene):
    output = scene[0](token_ids(1, 3), labels=token_ids(1, 3), mtp_loss_weight=1.0)
    assert output.mtp_losses[0] > 0
    assert [float(loss) for loss in output.mtp_losses[1:]] == [0.0, 0.0]
    assert torch.isfinite(output.loss)


@torch.no_grad()
def test_losses_of_accumulated_batches_add_up(scene):
    model, ids = scene[0], token_ids(1, LENGTH)
    mean = model(ids, labels=ids, mtp_loss_weight=1.0)
    parts = model(ids, labels=ids, mtp_loss_weight=1.0, num_items_in_batch=torch.tensor(100))
    for loss, part, head in zip(mean.mtp_losses, parts.mtp_losses, range(3)):
        assert math.isclose(float(part) * 100, float(loss) * (LENGTH - 2 - head), rel_tol=1e-5)


@torch.no_grad()
def test_the_config_may_say_the_weight(scene):
    model, ids = tiny_model(**SMALL, mtp_loss_weight=0.1), token_ids(1, LENGTH)
    assert torch.equal(model(ids, labels=ids).loss, scene[0](ids, labels=ids, mtp_loss_weight=0.1).loss)
    assert model(ids).mtp_losses is None


@torch.no_grad()
def test_what_is_captured_is_the_trunks_alone(scene):
    model, ids = scene[0], token_ids(1, LENGTH)
    options = {"labels": ids, "output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        plain, trained = (model(ids, mtp_loss_weight=weight, **options) for weight in (0.0, 1.0))
    finally:
        model.set_attn_implementation(before)
    for name in ("attentions", "hidden_states", "router_logits"):
        assert len(getattr(plain, name)) == len(getattr(trained, name)) > 0
        assert all(map(torch.equal, getattr(plain, name), getattr(trained, name)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_heads_learn_alone_on_a_frozen_trunk(checkpointing):
    model, ids = tiny_model(**SMALL).train(), token_ids(4, LENGTH)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.requires_grad_(False)
    model.model.mtp.requires_grad_(True)
    trunk = {name: weight.clone() for name, weight in model.named_parameters() if ".mtp." not in name}
    before = model(ids, labels=ids, mtp_loss_weight=1.0)
    before.loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and weight.grad.abs().sum() > 0) == (".mtp." in name), name
    optimizer = torch.optim.AdamW(model.model.mtp.parameters(), lr=3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        model(ids, labels=ids, mtp_loss_weight=1.0).loss.backward()
        optimizer.step()
    after = model(ids, labels=ids, mtp_loss_weight=1.0)
    assert all(new < 0.8 * old for new, old in zip(after.mtp_losses, before.mtp_losses))
    assert all(torch.equal(weight, trunk[name]) for name, weight in model.named_parameters() if name in trunk)
    assert torch.equal(after.logits, before.logits)


def test_gradients_reach_trunk_and_heads():
    model, ids = tiny_model(**SMALL).train(), token_ids(2, LENGTH)
    model(ids, labels=ids, mtp_loss_weight=0.1).loss.backward()
    assert all(weight.grad is not None for weight in model.model.mtp.parameters())
    # the heads' part of the trunk's gradient
    with_heads = model.model.layers[0].self_attn.o_proj.weight.grad.clone()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert not torch.allclose(with_heads, model.model.layers[0].self_attn.o_proj.weight.grad)


@torch.no_grad()
def test_heads_read_the_features_of_images():
    model = sight_model()
    ids = torch.cat((torch.arange(5, 11), torch.full((4,), SIGHT["image_token_id"]), torch.arange(20, 30)))[None]
    media = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    width = model.visual.patch_embed.proj.weight[0].numel()
    first, second = (
        model(ids, labels=ids, mtp_loss_weight=1.0, pixel_values=torch.randn(16, width) * scale, **media)
        for scale in (1.0, 3.0)
    )
    assert all(one != other for one, other in zip(first.mtp_losses, second.mtp_losses))


def test_one_head_becomes_three_that_are_saved_and_draft(tmp_path):
    model = tiny_model(**SMALL, num_nextn_predict_layers=1)
    model.replicate_mtp_head()
    first, *others = (layer.state_dict() for layer in model.model.mtp.layers)
    assert len(others) == 2
    for other in others:
        assert all(map(torch.equal, first.values(), other.values()))
    assert [layer.self_attn.layer_idx for layer in model.model.mtp.layers] == [0, 1, 2]
    # copies, to be trained apart
    assert len({weight.data_ptr() for weight in model.model.mtp.parameters()}) == 3 * len(first)
    ids = token_ids(1, LENGTH)
    with torch.no_grad():
        losses = model(ids, labels=ids, mtp_loss_weight=1.0).mtp_losses
    assert len(losses) == 3
    model.save_pretrained(tmp_path)
    again = MiMoV2ForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_mtp_layers == 3
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, use_mtp=True, mtp_depth=3, **options), model.generate(ids, **options))


def test_what_cannot_be_trained_is_named(scene):
    model, ids = scene[0], token_ids(1, 9)
    headless = tiny_model(**SMALL, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="`mtp_loss_weight`: expected a model with MTP heads, got one without"):
        headless(ids, labels=ids, mtp_loss_weight=1.0)
    with pytest.raises(ValueError, match="expected a model with an MTP head, got one without"):
        headless.replicate_mtp_head()
    with pytest.raises(ValueError, match="`count`: expected at least 1, got 0"):
        model.replicate_mtp_head(0)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="`cache`: expected none with `mtp_loss_weight`, got 9 cached"):
        model(ids, labels=ids, cache=cache, mtp_loss_weight=1.0)
    with pytest.raises(ValueError, match=r"`mtp_loss_weight`: expected at least 0, got -0\.5"):
        tiny_model(**SMALL, mtp_loss_weight=-0.5)
