"""The audio encoder against tests/audio_reference.py: tails, groups, batches, dtypes, gradients, memory, errors."""

import copy
import csv
import gzip
import json
from pathlib import Path

import pytest
import torch
from audio_reference import audio_features, frame_embedding
from tiny import CHANNELS, CODES, TINY_AUDIO, assert_near, omni_model, sight_model, tiny_model

import modeling_mimo
from modeling_mimo.configuration_mimo_v2_audio import MiMoV2AudioConfig
from modeling_mimo.modeling_mimo_v2_audio import GROUPS_PER_STEP, MiMoV2AudioEncoder, MiMoV2SpeechEmbeddings


pytestmark = pytest.mark.usefixtures("one_thread")
DATA = Path(modeling_mimo.__file__).parent / "data/MiMo-V2.5"
GROUP = TINY_AUDIO["group_size"]


def hearing_model(**changes):
    return omni_model(audio_config={**TINY_AUDIO, **changes})


@pytest.fixture(scope="module")
def model():
    return omni_model()


def random_codes(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, CODES, (length, CHANNELS), generator=generator) for length in lengths]


def lengths_of(audios):
    return torch.tensor([len(audio) for audio in audios])


def encode(model, audios):
    with torch.no_grad():
        return model.get_audio_features(torch.cat(audios), lengths_of(audios)).pooler_output


def reference(model, audios, **changes):
    with torch.no_grad():
        return audio_features(audios, {**TINY_AUDIO, **changes}, dict(model.named_parameters()))


def assert_all_near(got, expected, tolerance=1e-4):
    assert len(got) == len(expected)
    for left, right in zip(got, expected):
        assert_near(left, right, tolerance)


# Values ---------------------------------------------------------------------------------------------------------


def test_every_tail_length_equals_the_reference(model):
    audios = random_codes(*range(1, 10), 16, 21)
    expected = reference(model, audios)
    assert [len(features) for features in expected] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 6]
    assert torch.cat(expected).std() > 0.1
    assert_all_near(encode(model, audios), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_full_attention": False},
        {"add_post_norm": False},
        {"projection_layers": 1},
        {"partial_rotary_factor": 0.5},
        {"group_size": 1},
        {"group_size": 3},
        {"audio_channels": 1},
        {"rope_theta": 10.0},
    ],
    ids=str,
)
def test_other_encoders_equal_the_reference(changes):
    model = hearing_model(**changes)
    audios = [codes[:, : changes.get("audio_channels", CHANNELS)] for codes in random_codes(1, 6, 8)]
    assert_all_near(encode(model, audios), reference(model, audios, **changes))


@pytest.mark.parametrize(
    "changes", [{"input_full_attention": False}, {"rope_theta": 10.0}, {"add_post_norm": False}], ids=str
)
def test_the_tolerance_sees_wrong_masks_angles_and_norms(model, changes):
    audios = random_codes(5)
    assert (encode(model, audios)[0] - reference(model, audios, **changes)[0]).abs().max() > 1e-3


def test_the_zero_row_is_the_checkpoints_row(model):
    audios = random_codes(6)
    audios[0][2, 1] = int(TINY_AUDIO["speech_zeroemb_idx"])
    assert model.speech_embeddings[1].weight[16].abs().max() > 0
    assert_all_near(encode(model, audios), reference(model, audios))


def test_a_tail_is_the_last_frame_repeated(model):
    (audio,) = random_codes(6)
    filled = torch.cat([audio, audio[-1:], audio[-1:]])
    assert torch.equal(encode(model, [audio])[0], encode(model, [filled])[0])
    other = torch.cat([audio, audio[-2:]])
    assert (encode(model, [audio])[0][1] - encode(model, [other])[0][1]).abs().max() > 1e-2


def test_a_frame_changes_its_own_group_and_audio_alone(model):
    audios = random_codes(10, 7, 9)
    before = encode(model, audios)
    changed = [audio.clone() for audio in audios]
    changed[1][5] = (changed[1][5] + 1) % CODES
    after = encode(model, changed)
    for index in (0, 2):
        assert_near(after[index], before[index], 1e-6)
    assert_near(after[1][0], before[1][0], 1e-6)
    assert (after[1][1] - before[1][1]).abs().max() > 1e-2


def test_frames_of_a_group_see_one_another_and_their_order_counts(model):
    (audio,) = random_codes(4)
    first = encode(model, [audio])[0]
    assert (encode(model, [audio[[1, 0, 2, 3]]])[0] - first).abs().max() > 1e-2
    states = model.speech_embeddings(audio[None])
    changed = states.clone()
    changed[0, 3] += 1
    transformer = model.audio_encoder.input_local_transformer
    with torch.no_grad():
        assert (transformer(changed) - transformer(states))[0, 0].abs().max() > 1e-3


def test_audios_in_one_batch_equal_each_alone_over_several_steps(model, monkeypatch):
    audios = random_codes(3, 18, 1, 12, 5)
    alone = [encode(model, [audio])[0] for audio in audios]
    assert_all_near(encode(model, audios), alone, 1e-5)
    for groups in (1, 4):
        monkeypatch.setattr("modeling_mimo.modeling_mimo_v2.GROUPS_PER_STEP", groups)
        assert_all_near(encode(model, audios), alone, 1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_codes_of_any_integer_dtype(model, dtype):
    audios = random_codes(5)
    assert torch.equal(encode(model, [audios[0].to(dtype)])[0], encode(model, audios)[0])


def test_no_audio_gives_no_features(model):
    output = model.get_audio_features(torch.zeros(0, CHANNELS, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert output.pooler_output == []


def test_embeddings_add_up_in_channel_order_and_round_at_each_step():
    config = MiMoV2AudioConfig(**{**TINY_AUDIO, "audio_channels": 20})
    table = MiMoV2SpeechEmbeddings(config).bfloat16()
    codes = torch.randint(0, CODES, (64, 20))
    weights = dict(table.named_parameters(prefix="speech_embeddings"))
    step_by_step = torch.stack([frame_embedding(frame, {"audio_channels": 20}, weights) for frame in codes])
    exact = {name: weight.float() for name, weight in weights.items()}
    once = torch.stack([frame_embedding(frame, {"audio_channels": 20}, exact) for frame in codes]).bfloat16()
    assert not torch.equal(step_by_step, once)
    assert torch.equal(table(codes), step_by_step)


def test_bfloat16_is_as_close_as_its_rounding(model):
    audios = random_codes(4, 9, 30)
    rounded = copy.deepcopy(model).bfloat16()
    exact = torch.cat(encode(copy.deepcopy(rounded).float(), audios))
    got = torch.cat(encode(rounded, audios))
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).norm() / exact.norm() < 0.03


# Gradients ------------------------------------------------------------------------------------------------------


def gradients(model, features):
    parameters = {name: part for name, part in model.named_parameters() if name.startswith(("speech_", "audio_"))}
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    return dict(zip(parameters, torch.autograd.grad((features * weight).sum(), list(parameters.values()))))


def test_gradients_reach_every_parameter_and_equal_those_of_the_reference(model):
    audios = random_codes(9, 6)
    got = gradients(model, torch.cat(model.get_audio_features(torch.cat(audios), lengths_of(audios)).pooler_output))
    expected = gradients(model, torch.cat(audio_features(audios, TINY_AUDIO, dict(model.named_parameters()))))
    assert len(got) == CHANNELS + 12 * TINY_AUDIO["input_local_layers"] + 3
    for name, gradient in expected.items():
        # a bias of keys shifts all logits of a query by the same amount, except that rotation turns it
        assert gradient.abs().max() > 1e-4, name
        assert_near(got[name] / gradient.norm(), gradient / gradient.norm())


def test_the_zero_row_gets_no_gradient(model):
    (audio,) = random_codes(4)
    audio[:2, 0] = int(TINY_AUDIO["speech_zeroemb_idx"])
    features = model.get_audio_features(audio, lengths_of([audio])).pooler_output[0]
    gradient = gradients(model, features)["speech_embeddings.0.weight"]
    assert gradient[16].abs().max() == 0
    assert gradient[audio[2, 0]].abs().max() > 0


def test_gradient_checkpointing_runs_layers_again_and_changes_nothing():
    audios = random_codes(9, 6)
    found, calls = [], []
    for checkpointing in (False, True):
        model = omni_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        calls.append([])
        layer = model.audio_encoder.input_local_transformer.layers[1]
        layer.self_attn.register_forward_hook(lambda *_: calls[-1].append(1))
        output = model.get_audio_features(torch.cat(audios), lengths_of(audios))
        found.append(gradients(model, torch.cat(output.pooler_output)))
    assert [len(each) for each in calls] == [1, 2]
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient, 1e-5 * max(1.0, gradient.abs().max().item()))


def test_dropout_is_for_training_alone():
    model, audios = hearing_model(input_local_hidden_dropout=0.5), random_codes(9)
    expected = reference(model, audios)
    assert_all_near(encode(model, audios), expected)
    model.train()
    assert (encode(model, audios)[0] - expected[0]).abs().max() > 1e-2


# Memory ---------------------------------------------------------------------------------------------------------


def test_an_hour_runs_in_steps_of_bounded_size(model):
    seen = []
    hook = model.audio_encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    frames = 3 * GROUPS_PER_STEP * GROUP - 5
    encode(model, random_codes(frames))
    hook.remove()
    assert seen == [GROUPS_PER_STEP] * 2 + [GROUPS_PER_STEP - 1]


# Inputs and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "lengths", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.long), [4], r"`audio_codes`: expected \[frames, 5\].*, got \[4, 4\]"),
        (torch.zeros(4, 8, dtype=torch.long), [4], r"`audio_codes`: expected \[frames, 5\].*, got \[4, 8\]"),
        (torch.zeros(1, 4, 5, dtype=torch.long), [4], r"`audio_codes`: expected \[frames, 5\].*, got \[1, 4, 5\]"),
        (torch.zeros(5, dtype=torch.long), [1], r"`audio_codes`: expected \[frames, 5\].*, got \[5\]"),
        (torch.zeros(4, 5), [4], r"`audio_codes`: expected integers, got torch.float32"),
        (torch.zeros(4, 5, dtype=torch.bool), [4], r"`audio_codes`: expected integers, got torch.bool"),
        (torch.zeros(4, 5, dtype=torch.long), [4.0], r"`audio_code_lengths`: expected integers, got torch.float32"),
        (torch.zeros(4, 5, dtype=torch.long), [[4]], r"`audio_code_lengths`: expected \[audios\], got \[1, 1\]"),
        (torch.zeros(4, 5, dtype=torch.long), [4, 0], r"`audio_code_lengths\[1\]`: expected at least 1 frame, got 0"),
        (torch.zeros(4, 5, dtype=torch.long), [5, -1], r"`audio_code_lengths\[1\]`: expected at least 1 .* got -1"),
        (torch.zeros(4, 5, dtype=torch.long), [2, 3], r"`audio_codes`: expected 5 frames for `audio_code_l.*, got 4"),
        (torch.zeros(4, 5, dtype=torch.long), None, r"`audio_code_lengths`: expected \[audios\] beside .*got nothing"),
    ],
)
def test_wrong_inputs_are_named_with_both_sizes(model, codes, lengths, message):
    with pytest.raises(ValueError, match=message) as raised:
        model.get_audio_features(codes, None if lengths is None else torch.tensor(lengths))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("code", [-1, 20, 1000])
def test_the_first_code_out_of_range_is_named(model, code):
    codes = torch.zeros(6, CHANNELS, dtype=torch.long)
    codes[3, 4] = codes[4, 0] = code
    with pytest.raises(ValueError, match=rf"`audio_codes\[3, 4\]`: expected a code from 0 to 19, got {code}\.$"):
        model.get_audio_features(codes, torch.tensor([6]))


def test_a_model_that_cannot_hear_says_why():
    text = tiny_model(num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1])
    for deaf, why in (
        (text, "no audio_config"),
        (sight_model(), "no audio_config"),
        (omni_model(load_towers=False), "loaded with load_towers=False"),
    ):
        with pytest.raises(ValueError, match=rf"`audio_codes`: .* an audio encoder, got one without \({why}\)"):
            encode(deaf, random_codes(4))


def test_names_and_shapes_are_those_of_the_released_files():
    prefixes = ("speech_embeddings.", "audio_encoder.")
    with gzip.open(DATA / "tensor_manifest.tsv.gz", "rt") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row[0].startswith(prefixes)]
    released = {name: tuple(map(int, shape.split("x"))) for name, _, shape, *_ in rows}
    assert len(released) == 95
    config = MiMoV2AudioConfig(**json.loads((DATA / "config.json").read_text())["audio_config"])
    with torch.device("meta"):
        parts = {"speech_embeddings": MiMoV2SpeechEmbeddings(config), "audio_encoder": MiMoV2AudioEncoder(config)}
    state = {f"{part}.{name}": tensor for part in parts for name, tensor in parts[part].state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == released
    assert sum(tensor.numel() for tensor in state.values()) == 261_127_168
