"""Names that nobody reads: each argument misspelled once, in every function that takes `**kwargs`."""

import inspect
import re

import pytest
import torch
from tiny import media_prompt, omni_model, token_ids
from transformers import GenerationConfig
from transformers.utils import TransformersKwargs

from modeling_mimo import HybridCache
from modeling_mimo.modeling_mimo_v2 import MEDIA_NAMES, PASSED_ON


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return omni_model()


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "args", "kwargs")]


def misspelled(name):
    """`name` without a letter of its middle."""
    return name[: len(name) // 2] + name[len(name) // 2 + 1 :]


def refused(call, name, known=True):
    """The one line about `name`, which proposes a known name unless there is none like it."""
    with pytest.raises(ValueError, match=re.escape(f"`{name}`: expected an argument of ")) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert ("did you mean" in message) == known
    return message


FUNCTIONS = {
    "model": lambda model: model.forward,
    "backbone": lambda model: model.model.forward,
    "vision tower": lambda model: model.visual.forward,
    "audio encoder": lambda model: model.audio_encoder.forward,
    "image features": lambda model: model.get_image_features,
    "video features": lambda model: model.get_video_features,
    "audio features": lambda model: model.get_audio_features,
}


@pytest.mark.parametrize("which", FUNCTIONS)
def test_every_argument_misspelled_once_is_refused_with_the_right_name(model, which):
    function, names = FUNCTIONS[which](model), parameters(FUNCTIONS[which](model))
    assert names
    for name in names:
        message = refused(lambda name=name: function(**{misspelled(name): torch.ones(1)}), misspelled(name))
        assert f"did you mean `{name}`?" in message
    refused(lambda: function(zzz=torch.ones(1)), "zzz", known=False)


def test_every_argument_of_generate_misspelled_once_is_refused(model):
    ids, own = token_ids(1, 5), parameters(type(model).generate)
    for name in {*own, *parameters(model.forward), *GenerationConfig().to_dict(), "cache", "past_key_values"}:
        wrong = misspelled(name)
        if not hasattr(GenerationConfig(), wrong):
            refused(lambda wrong=wrong: model.generate(ids, **{wrong: 1}, max_new_tokens=1), wrong)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "inputs_embeds", "labels", "past_key_value", "x"])
@pytest.mark.parametrize("which", ["model", "backbone"])
def test_a_cache_under_another_name_is_refused(model, which, name):
    cache = HybridCache(model.config)
    with pytest.raises(ValueError, match=f"`{name}`: expected "):
        FUNCTIONS[which](model)(token_ids(1, 5), **{name: cache})
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("which", ["model", "backbone"])
def test_a_cache_by_position_is_taken_in_its_place_alone(model, which):
    cache, call = HybridCache(model.config), FUNCTIONS[which](model)
    with pytest.raises(ValueError, match="`attention_mask`: expected no cache, which goes into `cache`"):
        call(token_ids(1, 5), cache)
    call(token_ids(1, 5), None, None, cache)
    assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="`cache`: expected a Cache of Transformers, got tuple"):
        call(token_ids(1, 5), cache=((torch.ones(1), torch.ones(1)),))


def test_a_config_that_is_none_is_named_by_generate(model):
    with pytest.raises(ValueError, match="`generation_config`: expected a GenerationConfig, got HybridCache"):
        model.generate(token_ids(1, 5), HybridCache(model.config))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_layer_called_by_hand_fills_a_cache_under_either_name(model, name):
    backbone, cache = model.model, HybridCache(model.config)
    hidden_states, positions = backbone.embed_tokens(token_ids(1, 5)), torch.arange(5)[None]
    rotary = backbone.rotary_emb(hidden_states, positions, model.config.layer_types[0])
    backbone.layers[0](hidden_states, position_embeddings=rotary, **{name: cache})
    assert cache.layers[0].get_seq_length() == 5
    mtp = HybridCache(model.config)
    rotary = backbone.rotary_emb(hidden_states, positions, "sliding_attention")
    backbone.mtp.layers[1](hidden_states, hidden_states, position_embeddings=rotary, **{name: mtp})
    assert mtp.layers[1].get_seq_length() == 5


def test_both_names_of_the_cache_at_once_are_refused(model):
    caches = {name: HybridCache(model.config) for name in ("cache", "past_key_values")}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="`cache`: expected it once, got `past_key_values` beside it"):
            call(token_ids(1, 5), **caches)
        # None is no argument
        call(token_ids(1, 5), cache=caches["cache"], past_key_values=None)
        caches["cache"] = HybridCache(model.config)


def test_what_is_passed_on_reaches_the_loss_and_the_outputs(model):
    ids = token_ids(1, 9)
    plain = model(ids, labels=ids).loss
    assert torch.allclose(model(ids, labels=ids, num_items_in_batch=torch.tensor(16)).loss, plain / 2)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.allclose(model(ids, labels=ids, shift_labels=shifted).loss, plain)
    output = model(ids, output_hidden_states=True, output_router_logits=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert output.router_logits
    # packed sequences come with positions, by which every kernel but flash tells them apart
    bounds, positions = torch.tensor([0, 4, 9]), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    logits = model(ids, position_ids=positions, **lengths).logits
    torch.testing.assert_close(logits[:, 4:], model(ids[:, 4:]).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="`position_ids`: expected positions that restart"):
        model(ids, **lengths)


def test_each_of_transformers_own_arguments_is_read_or_refused(model):
    """A new one of the next line shows here: it is put on the list, or stays refused."""
    read = {*PASSED_ON, *parameters(model.forward)}
    assert TransformersKwargs.__annotations__.keys() - read == {"is_causal", "seq_idx"}
    for name in ("is_causal", "seq_idx"):
        with pytest.raises(ValueError, match=f"`{name}`: expected an argument of "):
            model(token_ids(1, 5), **{name: False})


def test_media_for_the_backbone_are_named_as_media(model):
    inputs = media_prompt(5, ("image", 1, 2, 2), 3)
    assert set(MEDIA_NAMES) & inputs.keys()
    with pytest.raises(ValueError, match="`pixel_values`: expected text alone, got media"):
        model.model(**inputs)


def test_generate_takes_the_tokenizer_of_stop_strings_and_forward_does_not(model):
    class Tokenizer:
        pass

    with pytest.raises(ValueError, match="`tokenizer`: expected an argument of "):
        model(token_ids(1, 5), tokenizer=Tokenizer())
    assert model.generate(token_ids(1, 5), tokenizer=Tokenizer(), max_new_tokens=2).shape == (1, 7)
