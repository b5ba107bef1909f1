"""`attn_implementation` and `experts_implementation`: every pair that runs here gives the same numbers."""

import copy
import itertools

import pytest
import torch
from tiny import OMNI, assert_near, batched, media_prompt, omni_model, randomize, tiny_config
from transformers import AutoModelForCausalLM

from modeling_mimo import MiMoV2ForCausalLM


pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = list(itertools.product(("sdpa", "eager"), ("eager", "grouped_mm", "batched_mm")))
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def scene():
    """A model, a padded batch with all media, and its logits and tokens with nothing switched."""
    model = omni_model()
    inputs = batched(media_prompt(5, ("image", 1, 4, 4), 30), media_prompt(9, ("audio", 9), 4, seed=1))
    with torch.no_grad():
        return model, inputs, model(**inputs).logits, model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize(("attention", "experts"), PAIRS)
def test_every_pair_gives_the_same_numbers_after_loading(scene, attention, experts):
    model, inputs, logits, tokens = scene
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    assert (model.config._attn_implementation, model.config._experts_implementation) == (attention, experts)
    with torch.no_grad():
        assert_near(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), tokens)


@pytest.mark.parametrize(("attention", "experts"), [PAIRS[0], PAIRS[-1]])
def test_gradients_do_not_depend_on_the_switches(scene, attention, experts):
    model, inputs, _, _ = scene
    switched = copy.deepcopy(model)
    switched.set_attn_implementation(attention)
    switched.set_experts_implementation(experts)
    for one in (model, switched):
        one.zero_grad()
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = dict(model.named_parameters())
    for name, parameter in switched.named_parameters():
        if parameter.grad is not None:
            assert_near(parameter.grad, expected[name].grad, 1e-5)


def test_both_may_be_chosen_when_loading(checkpoints):
    path = checkpoints["bf16_fused"]
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="grouped_mm"
    )
    assert model.config._attn_implementation == model.model.config._attn_implementation == "eager"
    assert model.config._experts_implementation == "grouped_mm"
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert_near(model.float()(ids).logits, plain(ids).logits)


def test_a_config_may_carry_the_choice():
    config = tiny_config(**OMNI)
    config._attn_implementation = "eager"
    assert randomize(MiMoV2ForCausalLM(config)).config._attn_implementation == "eager"


@torch.no_grad()
def test_a_dict_sets_the_text_model_and_towers_have_one_implementation(scene):
    model, inputs, logits, _ = scene
    model = copy.deepcopy(model)
    model.set_attn_implementation({"": "eager", "vision_config": "sdpa", "audio_config": "eager"})
    model.set_experts_implementation({"": "grouped_mm"})
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("eager", "grouped_mm")
    assert_near(model(**inputs).logits, logits)
    with pytest.raises(ValueError, match="would drop the attention sinks"):
        model.set_attn_implementation({"": "flash_attention_2"})


def test_context_parallelism_is_not_offered(scene):
    # Transformers asks this before it splits a sequence over processes
    assert not scene[0].supports_context_parallel
