"""Images, videos and audio in the model: features at their placeholders, encoded once; batches, chunks and turns."""

import pytest
import torch
from reference import reference_logits
from tiny import (
    AUDIO_ID,
    IMAGE_ID,
    OMNI,
    PATCH_VALUES,
    SIGHT,
    VIDEO_ID,
    assert_near,
    batched,
    media_prompt,
    omni_model,
    page_weights,
    sight_model,
    tiny_dict,
    tiny_model,
)

from modeling_mimo import HybridCache


pytestmark = pytest.mark.usefixtures("one_thread")

# text, two images of different grids and a video of three temporal grids
PROMPT = (5, ("image", 1, 4, 6), 3, ("video", 3, 2, 4), 2, ("image", 1, 2, 2), 4)


@pytest.fixture(scope="module")
def model():
    return sight_model()


@pytest.fixture
def encoded(model):
    """Grids that the tower is asked to encode, call by call."""
    calls = []
    hook = model.visual.register_forward_pre_hook(lambda module, args: calls.append(args[1].tolist()))
    yield calls
    hook.remove()


def greedy(model, inputs, new_tokens=6, **kwargs):
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=3, **kwargs)


def embedded(model, inputs):
    """Embeddings of `inputs` with features put in their places one token at a time."""
    ids = inputs["input_ids"]
    embeddings = model.model.embed_tokens(ids).clone()
    features = {}
    if "pixel_values" in inputs:
        output = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        features[IMAGE_ID] = list(torch.cat(output.pooler_output))
    if "pixel_values_videos" in inputs:
        output = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        features[VIDEO_ID] = list(torch.cat(output.pooler_output))
    if "audio_codes" in inputs:
        output = model.get_audio_features(inputs["audio_codes"], inputs["audio_code_lengths"])
        features[AUDIO_ID] = list(torch.cat(output.pooler_output))
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            if ids[row, column].item() in features:
                embeddings[row, column] = features[ids[row, column].item()].pop(0)
    assert not any(features.values())
    return embeddings


def test_logits_equal_the_naive_page_with_features_put_in_by_hand(model):
    inputs = media_prompt(*PROMPT)
    raw = tiny_dict(**SIGHT)
    with torch.no_grad():
        expected = reference_logits(page_weights(model, raw), raw, inputs_embeds=embedded(model, inputs))
        assert_near(model(**inputs).logits, expected)


def test_features_come_one_tensor_per_medium(model):
    inputs = media_prompt(*PROMPT)
    images = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    videos = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    assert [list(part.shape) for part in images] == [[6, 64], [1, 64]]
    assert [list(part.shape) for part in videos] == [[6, 64]]


def test_rows_of_a_padded_batch_equal_each_row_alone(model):
    rows = [
        media_prompt(3, ("image", 1, 2, 4), 2, ("image", 1, 4, 4), 1, seed=1),
        media_prompt(9, seed=2),
        media_prompt(2, ("video", 2, 2, 2), 1, ("image", 1, 2, 2), 5, seed=3),
    ]
    with torch.no_grad():
        together = model(**batched(*rows)).logits
        for row, logits in zip(rows, together):
            alone = model(**row).logits[0]
            assert_near(logits[-len(alone) :], alone)


def test_generation_equals_full_forwards(model, encoded):
    inputs = media_prompt(*PROMPT)
    got = greedy(model, inputs)
    assert len(encoded) == 2
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            best = model(**{**inputs, "input_ids": ids}).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
    assert got.tolist() == ids.tolist()


@pytest.mark.parametrize("size", [1, 4, 7, 16])
def test_a_chunked_prefill_encodes_once_and_gives_the_same_tokens(model, encoded, size):
    inputs = media_prompt(*PROMPT)
    expected = greedy(model, inputs)
    encoded.clear()
    assert greedy(model, inputs, prefill_chunk_size=size).tolist() == expected.tolist()
    assert encoded == [[[1, 4, 6], [1, 2, 2]], [[3, 2, 4]]]


def test_beams_share_the_features(model, encoded):
    rows = [media_prompt(3, ("image", 1, 2, 4), 2, seed=1), media_prompt(4, ("image", 1, 2, 2), 3, seed=2)]
    got = greedy(model, batched(*rows), num_beams=3, num_return_sequences=2)
    assert len(encoded) == 1
    for row, sequences in zip(rows, got.unflatten(0, (2, 2))):
        alone = greedy(model, row, num_beams=3, num_return_sequences=2)
        assert sequences[:, -6:].tolist() == alone[:, -6:].tolist()


def test_a_second_turn_encodes_only_its_own_media(model, encoded):
    first = (5, ("image", 1, 4, 6), 3)
    second = (*first, 2, ("image", 1, 2, 4), 2, ("video", 2, 2, 2), 4)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(**media_prompt(*first), cache=cache, use_cache=True)
    inputs = media_prompt(*second)
    expected = greedy(model, inputs)
    encoded.clear()
    assert greedy(model, inputs, cache=cache).tolist() == expected.tolist()
    assert encoded == [[[1, 2, 4]], [[2, 2, 2]]]


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_second_turn_may_bring_media_of_another_kind_or_none(model, encoded, chunk):
    turns = [(5, ("image", 1, 4, 6), 3), (2, ("video", 2, 2, 2), 1), (4,)]
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(**media_prompt(*turns[0]), cache=cache, use_cache=True)
    for number, grids in ((2, [[[2, 2, 2]]]), (3, [])):
        inputs = media_prompt(*(segment for turn in turns[:number] for segment in turn))
        expected = greedy(model, inputs)
        encoded.clear()
        got = greedy(model, inputs, cache=cache, prefill_chunk_size=chunk)
        assert got.tolist() == expected.tolist()
        assert encoded == grids
        # back to the end of the prompt: the next turn goes on from there
        cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())


@pytest.mark.parametrize("length", [8, 9, 13, 14])
def test_a_cache_may_end_inside_an_image(model, encoded, length):
    inputs = media_prompt(*PROMPT)
    expected = greedy(model, inputs)
    cache = HybridCache(model.config)
    start = media_prompt(5, ("image", 1, 4, 6), 3)
    features = model.get_image_features(start["pixel_values"], start["image_grid_thw"])
    features.pooler_output = [features.pooler_output[0][: max(length - 6, 0)]]
    with torch.no_grad():
        model(
            start["input_ids"][:, :length],
            cache=cache,
            use_cache=True,
            mm_encoder_outputs={"image": features},
        )
    encoded.clear()
    assert greedy(model, inputs, cache=cache).tolist() == expected.tolist()
    images = [[1, 4, 6], [1, 2, 2]] if length < 12 else [[1, 2, 2]]
    assert encoded == [images, [[3, 2, 4]]]


def test_new_tokens_alone_bring_their_own_media(model, encoded):
    cache, whole = HybridCache(model.config), media_prompt(5, ("image", 1, 4, 6), 3, ("image", 1, 2, 4), 2)
    expected = greedy(model, whole)
    first = media_prompt(5, ("image", 1, 4, 6), 3)
    with torch.no_grad():
        model(**first, cache=cache, use_cache=True)
    new = {
        "input_ids": whole["input_ids"][:, first["input_ids"].shape[1] :],
        "attention_mask": torch.ones_like(whole["input_ids"]),
        "pixel_values": whole["pixel_values"][24:],
        "image_grid_thw": whole["image_grid_thw"][1:],
    }
    encoded.clear()
    assert greedy(model, new, cache=cache)[:, -6:].tolist() == expected[:, -6:].tolist()
    assert encoded == [[[1, 2, 4]]]


def test_gradients_reach_the_tower_and_the_text(model):
    inputs = media_prompt(*PROMPT)
    labels = inputs["input_ids"].clone()
    labels[(labels == IMAGE_ID) | (labels == VIDEO_ID)] = -100
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    # the MTP heads do not run
    names = [name for name, _ in model.named_parameters() if ".mtp." not in name]
    silent = [name for name in names if name not in got or not got[name].abs().max() > 0]
    # experts that no token chose have no gradient of their own: stacked tensors always have some
    assert silent == []
    model.zero_grad()
    model(inputs_embeds=embedded(model, inputs), labels=labels).loss.backward()
    parameters = dict(model.named_parameters())
    for name in names:
        assert_near(got[name], parameters[name].grad, 1e-5)
    model.zero_grad()


def changed(inputs, **changes):
    return {name: tensor for name, tensor in {**inputs, **changes}.items() if tensor is not None}


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"pixel_values": None, "image_grid_thw": None},
            r"`pixel_values`: expected 7 features, one per image placeholder in `input_ids`, got 0",
            id="placeholders without images",
        ),
        pytest.param(
            {"pixel_values_videos": None, "video_grid_thw": None},
            r"`pixel_values_videos`: expected 6 features, one per video placeholder in `input_ids`, got 0",
            id="placeholders without videos",
        ),
        pytest.param(
            {"pixel_values": torch.zeros(24, PATCH_VALUES), "image_grid_thw": torch.tensor([[1, 4, 6]])},
            r"`pixel_values`: expected 7 features, one per image placeholder in `input_ids`, got 6",
            id="an image too few",
        ),
        pytest.param(
            {"pixel_values": torch.zeros(40, PATCH_VALUES), "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4]])},
            r"`pixel_values`: expected 7 features, one per image placeholder in `input_ids`, got 10",
            id="an image too large",
        ),
        pytest.param({"image_grid_thw": None}, r"`image_grid_thw`: expected \[media, 3\]", id="no grids"),
    ],
)
def test_features_and_placeholders_must_agree(model, call, changes, message):
    inputs = changed(media_prompt(*PROMPT), **changes)
    with pytest.raises(ValueError, match=message):
        model(**inputs) if call == "forward" else greedy(model, inputs)


def test_media_without_placeholders_are_refused(model):
    inputs = media_prompt(3, ("image", 1, 2, 2), 2)
    inputs["input_ids"] = torch.full_like(inputs["input_ids"], 5)
    for call in (model, lambda **inputs: greedy(model, inputs)):
        with pytest.raises(ValueError, match=r"expected 0 features, one per image placeholder in `input_ids`, got 1"):
            call(**inputs)


def test_new_placeholders_after_a_cache_need_media(model):
    cache, inputs = HybridCache(model.config), media_prompt(5, ("image", 1, 2, 4), 3)
    with torch.no_grad():
        model(inputs["input_ids"][:, :4], cache=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"expected 2 features, one per image placeholder in `input_ids`, got 0"):
        greedy(model, {"input_ids": inputs["input_ids"]}, cache=cache)


def test_media_need_input_ids(model):
    inputs = media_prompt(3, ("image", 1, 2, 2), 2)
    embeddings = model.model.embed_tokens(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="`input_ids`: expected placeholders for"):
        model(**inputs, inputs_embeds=embeddings)


def test_a_model_may_write_a_placeholder_token(model):
    inputs = media_prompt(5, ("image", 1, 2, 4), 3)
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(**inputs, cache=cache, use_cache=True)
        logits = model(torch.tensor([[IMAGE_ID]]), cache=cache, use_cache=True).logits
    assert logits.isfinite().all()


def test_without_towers_the_model_is_the_text_model_and_says_so(model):
    blind = sight_model(load_towers=False)
    assert blind.visual is None
    assert not [name for name in blind.state_dict() if name.startswith("visual.")]
    blind.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "visual" not in name})
    text = media_prompt(12)
    with torch.no_grad():
        assert torch.equal(blind(**text).logits, model(**text).logits)
    for call in (blind, lambda **inputs: greedy(blind, inputs)):
        with pytest.raises(ValueError, match=r"`pixel_values`: .* vision tower, got one without \(loaded with load_t"):
            call(**media_prompt(3, ("image", 1, 2, 2)))
        with pytest.raises(ValueError, match=r"expected 1 features, one per video placeholder in `input_ids`, got 0"):
            call(input_ids=torch.tensor([[5, VIDEO_ID, 6]]))


def test_a_text_only_config_has_no_tower_and_says_so():
    text_only = tiny_model(num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1])
    with pytest.raises(ValueError, match=r"vision tower, got one without \(no vision_config\)"):
        text_only(**media_prompt(3, ("image", 1, 2, 2)))


def test_gradient_checkpointing_changes_nothing(model):
    inputs = media_prompt(*PROMPT)
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = model.visual.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model.activation_checkpointing_enable()
    model.train()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    model.eval()
    model.activation_checkpointing_disable()
    assert_near(model.visual.patch_embed.proj.weight.grad, expected, 1e-6)
    model.zero_grad()


# Audio ----------------------------------------------------------------------------------------------------------

# all four modalities, tails of groups included
OMNI_PROMPT = (3, ("audio", 9), 2, ("image", 1, 2, 4), ("audio", 4), 1, ("video", 2, 2, 2), ("audio", 6), 3)


@pytest.fixture(scope="module")
def omni():
    return omni_model()


@pytest.fixture
def heard(omni):
    """Groups of frames that the audio encoder is asked to encode, call by call."""
    calls = []
    hook = omni.audio_encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


def precomputed(model, inputs):
    """`inputs` with the features of each modality instead of pixels and codes."""
    encode = {
        "image": (model.get_image_features, "pixel_values", "image_grid_thw"),
        "video": (model.get_video_features, "pixel_values_videos", "video_grid_thw"),
        "audio": (model.get_audio_features, "audio_codes", "audio_code_lengths"),
    }
    features = {
        modality: function(inputs[data], inputs[sizes])
        for modality, (function, data, sizes) in encode.items()
        if data in inputs
    }
    return {"input_ids": inputs["input_ids"], "mm_encoder_outputs": features}


def test_all_modalities_equal_the_naive_page_with_features_put_in_by_hand(omni):
    inputs, raw = media_prompt(*OMNI_PROMPT), tiny_dict(**OMNI)
    with torch.no_grad():
        expected = reference_logits(page_weights(omni, raw), raw, inputs_embeds=embedded(omni, inputs))
        assert_near(omni(**inputs).logits, expected)
        assert_near(omni(**precomputed(omni, inputs)).logits, expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_modalities_may_come_in_any_order(omni, order):
    media = [("audio", 6), ("image", 1, 2, 4), ("video", 2, 2, 2)]
    inputs = media_prompt(2, *(media[index] for index in order), 3, ("audio", 3))
    with torch.no_grad():
        assert_near(omni(**inputs).logits, omni(inputs_embeds=embedded(omni, inputs)).logits, 1e-6)
    assert greedy(omni, inputs).tolist() == greedy(omni, precomputed(omni, inputs)).tolist()


def test_rows_of_a_padded_batch_with_audio_equal_each_row_alone(omni):
    rows = [
        media_prompt(3, ("audio", 5), 2, ("image", 1, 2, 4), ("audio", 2), seed=1),
        media_prompt(4, seed=2),
        media_prompt(1, ("audio", 13), ("video", 2, 2, 2), 5, seed=3),
    ]
    with torch.no_grad():
        together = omni(**batched(*rows)).logits
        for row, logits in zip(rows, together):
            alone = omni(**row).logits[0]
            assert_near(logits[-len(alone) :], alone)


def test_generation_hears_once_and_equals_full_forwards(omni, heard):
    inputs = media_prompt(*OMNI_PROMPT)
    got = greedy(omni, inputs)
    assert heard == [6]
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            best = omni(**{**inputs, "input_ids": ids}).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
    assert got.tolist() == ids.tolist()


@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_chunked_prefill_hears_once(omni, heard, size):
    inputs = media_prompt(*OMNI_PROMPT)
    expected = greedy(omni, inputs)
    heard.clear()
    assert greedy(omni, inputs, prefill_chunk_size=size).tolist() == expected.tolist()
    assert heard == [6]


@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 2, "prefill_chunk_size": 5},
    ],
    ids=str,
)
def test_beams_share_what_was_heard(omni, heard, search):
    rows = [
        media_prompt(2, ("audio", 5), 2, ("audio", 2), ("image", 1, 2, 2), 1, seed=1),
        media_prompt(4, seed=2),
        media_prompt(1, ("audio", 9), 3, seed=3),
    ]
    got = greedy(omni, batched(*rows), **search)
    assert heard == [6]
    returned = search.get("num_return_sequences", 1)
    for row, sequences in zip(rows, got.unflatten(0, (3, returned))):
        alone = greedy(omni, row, **search)
        assert sequences[:, -6:].tolist() == alone[:, -6:].tolist()


def test_sampled_sequences_share_what_was_heard(omni, heard):
    rows = [media_prompt(2, ("audio", 5), 2, seed=1), media_prompt(1, ("audio", 9), 3, ("audio", 1), seed=3)]
    inputs = batched(*rows)
    got = omni.generate(**inputs, do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=6, pad_token_id=3)
    assert heard == [6]
    assert got.tolist() == greedy(omni, inputs).repeat_interleave(3, dim=0).tolist()


@pytest.mark.parametrize("chunk", [None, 3])
def test_each_turn_hears_only_what_is_new(omni, heard, chunk):
    turns = [(5, ("audio", 10), 3), (2, ("image", 1, 2, 4), ("audio", 3), 1), (4,), (("audio", 4), ("audio", 8), 2)]
    cache = HybridCache(omni.config)
    with torch.no_grad():
        omni(**media_prompt(*turns[0]), cache=cache, use_cache=True)
    for number, groups in ((2, [1]), (3, []), (4, [3])):
        inputs = media_prompt(*(segment for turn in turns[:number] for segment in turn))
        expected = greedy(omni, inputs)
        heard.clear()
        assert greedy(omni, inputs, cache=cache, prefill_chunk_size=chunk).tolist() == expected.tolist()
        assert heard == groups
        # back to the end of the prompt: the next turn goes on from there
        cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())


def test_drafts_go_on_from_everything_seen_and_heard(omni, heard):
    """Greedy tokens with MTP are those without, in a padded batch of all modalities and in a later turn."""
    rows = [media_prompt(*OMNI_PROMPT), media_prompt(1, ("audio", 13), 4, seed=3)]
    inputs = batched(*rows)
    output = greedy(omni, inputs, 16, use_mtp=True, return_dict_in_generate=True)
    assert output.sequences.tolist() == greedy(omni, inputs, 16).tolist()
    assert sum(output.mtp_stats.proposed) > 0
    cache = HybridCache(omni.config)
    first, second = (5, ("audio", 10), 3), (5, ("audio", 10), 3, ("image", 1, 2, 4), ("audio", 3), 1)
    greedy(omni, media_prompt(*first), 1, cache=cache, use_mtp=True)
    inputs, heard[:] = media_prompt(*second), []
    assert greedy(omni, inputs, cache=cache, use_mtp=True).tolist() == greedy(omni, inputs).tolist()
    assert heard[0] == 1


def test_beams_go_on_from_a_cache(omni, heard):
    first, second = (5, ("audio", 10), 3), (5, ("audio", 10), 3, ("audio", 6), 2)
    inputs = media_prompt(*second)
    expected = greedy(omni, inputs, num_beams=2)
    cache = HybridCache(omni.config)
    start = media_prompt(*first)
    with torch.no_grad():
        omni(**batched(start, start), cache=cache, use_cache=True)
    heard.clear()
    assert greedy(omni, inputs, num_beams=2, cache=cache).tolist() == expected.tolist()
    assert heard == [2]


@pytest.mark.parametrize("length", [5, 6, 7])
def test_a_cache_may_end_inside_an_audio(omni, heard, length):
    inputs = media_prompt(3, ("audio", 14), 2, ("audio", 3), 2)
    expected = greedy(omni, inputs)
    features = omni.get_audio_features(inputs["audio_codes"][:14], torch.tensor([14]))
    features.pooler_output = [features.pooler_output[0][: length - 4]]
    cache = HybridCache(omni.config)
    start = inputs["input_ids"][:, :length]
    with torch.no_grad():
        omni(start, cache=cache, use_cache=True, mm_encoder_outputs={"audio": features})
    heard.clear()
    assert greedy(omni, inputs, cache=cache).tolist() == expected.tolist()
    assert heard == [5]


def test_gradients_reach_every_part(omni):
    inputs = media_prompt(*OMNI_PROMPT)
    omni.zero_grad()
    omni(**inputs, labels=inputs["input_ids"]).loss.backward()
    silent = [name for name, part in omni.named_parameters() if part.grad is None or not part.grad.abs().max() > 0]
    # the MTP heads do not run
    assert [name for name in silent if ".mtp." not in name] == []
    omni.zero_grad()


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"audio_codes": None, "audio_code_lengths": None},
            r"`audio_codes`: expected 6 features, one per audio placeholder in `input_ids`, got 0",
            id="placeholders without audio",
        ),
        pytest.param(
            {"audio_codes": torch.zeros(13, 5, dtype=torch.long), "audio_code_lengths": torch.tensor([9, 4])},
            r"`audio_codes`: expected 6 features, one per audio placeholder in `input_ids`, got 4",
            id="an audio too few",
        ),
        pytest.param({"audio_code_lengths": None}, r"`audio_code_lengths`: expected \[audios\]", id="no lengths"),
        pytest.param(
            {"audio_code_lengths": torch.tensor([9, 4, 7])},
            r"`audio_codes`: expected 20 frames for `audio_code_lengths`, got 19",
            id="a frame too many",
        ),
        pytest.param(
            {"audio_codes": torch.full((19, 5), 20)},
            r"`audio_codes\[0, 0\]`: expected a code from 0 to 19, got 20",
            id="codes out of range",
        ),
    ],
)
def test_codes_and_placeholders_must_agree(omni, call, changes, message):
    inputs = changed(media_prompt(*OMNI_PROMPT), **changes)
    with pytest.raises(ValueError, match=message):
        omni(**inputs) if call == "forward" else greedy(omni, inputs)


def test_features_and_codes_of_one_modality_are_refused_by_generate(omni):
    inputs = media_prompt(2, ("audio", 5), 1)
    with pytest.raises(ValueError, match="`audio_codes`: expected nothing beside audio features, got both"):
        greedy(omni, {**inputs, **precomputed(omni, inputs)})


def test_a_model_without_towers_neither_sees_nor_hears(omni):
    deaf = omni_model(load_towers=False)
    assert (deaf.visual, deaf.audio_encoder, deaf.speech_embeddings) == (None, None, None)
    assert deaf.state_dict().keys() == {name for name in omni.state_dict() if name.startswith(("model.", "lm_head."))}
    for call in (deaf, lambda **inputs: greedy(deaf, inputs)):
        with pytest.raises(
            ValueError, match=r"`audio_codes`: .* an audio encoder, got one without \(loaded with load"
        ):
            call(**media_prompt(3, ("audio", 5)))
        with pytest.raises(ValueError, match=r"expected 1 features, one per audio placeholder in `input_ids`, got 0"):
            call(input_ids=torch.tensor([[5, AUDIO_ID, 6]]))


def test_a_seeing_model_takes_no_sound(model):
    for call in (model, lambda **inputs: greedy(model, inputs)):
        with pytest.raises(ValueError, match=r"an audio encoder, got one without \(no audio_config\)"):
            call(**media_prompt(3, ("audio", 5)))
