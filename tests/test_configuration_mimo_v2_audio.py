"""The audio part of config.json: both spellings, strings kept, ids of the processor's part, contradictions by name."""

import json
from pathlib import Path

import pytest

import modeling_mimo
from modeling_mimo import MiMoV2Config
from modeling_mimo.configuration_mimo_v2_audio import MiMoV2AudioConfig


RELEASED = json.loads((Path(modeling_mimo.__file__).parent / "data/MiMo-V2.5/config.json").read_text())
AUDIO = RELEASED["audio_config"]


def without_ids(**changes):
    processor = {key: value for key, value in RELEASED["processor_config"].items() if not key.startswith("audio_")}
    return {**RELEASED, "processor_config": processor, **changes}


def test_the_released_spelling():
    config = MiMoV2AudioConfig(**AUDIO)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 6, 16)
    assert (config.head_dim, config.intermediate_size, config.attention_dropout) == (64, 4096, 0.0)
    assert (config.speech_vocab_size, config.speech_zeroemb_idx) == (1280, 1024)
    assert not [name for name in AUDIO if name.startswith("input_local_") and hasattr(config, name)]


def test_the_defaults_are_those_of_v2_5():
    assert MiMoV2AudioConfig().to_dict() == MiMoV2AudioConfig(**AUDIO).to_dict()


def test_every_key_survives_two_rounds_strings_included():
    config = MiMoV2AudioConfig(**AUDIO)
    for _ in range(2):
        written = json.loads(json.dumps(config.to_dict()))
        assert {key: written[key] for key in AUDIO} == AUDIO
        config = MiMoV2AudioConfig(**written)


def test_an_unchanged_encoder_is_written_as_it_was_read_and_a_changed_one_is_not(tmp_path):
    config = MiMoV2Config.from_dict(RELEASED)
    assert isinstance(config.audio_config, MiMoV2AudioConfig)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in RELEASED if "transformers" not in key} == {
        key: value for key, value in RELEASED.items() if "transformers" not in key
    }
    assert not [key for key in written if key.startswith("audio_") and key != "audio_config"]
    config.audio_config.speech_vocab_size = 2048
    config.save_pretrained(tmp_path)
    again = MiMoV2Config.from_pretrained(tmp_path)
    assert again.audio_config.speech_vocab_size == 2048
    assert again.audio_config.num_hidden_layers == 6


@pytest.mark.parametrize("written", ["1024", 1024, "-".join(["1024"] * 20)])
def test_a_number_may_be_written_once_or_per_channel(written):
    config = MiMoV2AudioConfig(**{**AUDIO, "speech_zeroemb_idx": written})
    assert config.speech_zeroemb_idx == 1024
    assert config.to_dict()["speech_zeroemb_idx"] == str(written)


def test_a_number_of_its_own_per_channel_is_an_honest_gap():
    sizes = "-".join(["1025"] * 2 + ["129"] * 18)
    with pytest.raises(NotImplementedError, match=r"`audio_config\.speech_vocab_size`: only one number for all"):
        MiMoV2AudioConfig(**{**AUDIO, "speech_vocab_size": sizes})


def test_ids_come_from_the_top_or_from_the_processors_part():
    config = MiMoV2Config.from_dict(RELEASED)
    assert (config.audio_token_id, config.audio_start_token_id, config.audio_end_token_id) == (151669, 151673, 151674)
    assert MiMoV2Config.from_dict({**RELEASED, "audio_token_id": 7}).audio_token_id == 7
    config = MiMoV2Config.from_dict(without_ids(audio_token_id=7))
    assert (config.audio_token_id, config.audio_start_token_id) == (7, None)
    assert config.to_dict()["audio_token_id"] == 7
    assert "audio_token_id" not in config.to_dict()["processor_config"]


def test_a_changed_id_is_written_and_read_again(tmp_path):
    config = MiMoV2Config.from_dict(RELEASED)
    config.audio_token_id = 7
    config.save_pretrained(tmp_path)
    assert MiMoV2Config.from_pretrained(tmp_path).audio_token_id == 7


@pytest.mark.parametrize("changes", [{}, {"processor_config": None}])
def test_hearing_needs_the_id_of_its_placeholder(changes):
    with pytest.raises(ValueError, match="`audio_token_id`: expected the id of a placeholder beside audio_config"):
        MiMoV2Config.from_dict(without_ids(**changes))
    MiMoV2Config.from_dict(without_ids(**changes, audio_config=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 12}, r"`audio_config.input_local_layers`: expected num_hidden_layers=12, got 6"),
        ({"speech_vocab_size": "many"}, r"`audio_config.speech_vocab_size`: expected a number, .* got 'many'"),
        ({"speech_vocab_size": "9-9"}, r"`audio_config.speech_vocab_size`: .* one per channel \(20\) .* got '9-9'"),
        ({"speech_vocab_size": -3}, r"`audio_config.speech_vocab_size`: expected a number, .* got -3"),
        ({"speech_vocab_size": "0"}, r"`audio_config.speech_vocab_size`: expected at least 1, got 0"),
        ({"speech_zeroemb_idx": "1280"}, r"`audio_config.speech_zeroemb_idx`: expected a row below .*=1280, got 1280"),
        ({"audio_channels": 0}, r"`audio_config.audio_channels`: expected at least 1, got 0"),
        ({"group_size": 0}, r"`audio_config.group_size`: expected at least 1, got 0"),
        ({"projection_layers": 3}, r"`audio_config.projection_layers`: expected 1 or 2, got 3"),
        ({"input_local_hidden_dropout": 1.0}, r"`audio_config.attention_dropout`: expected 0 to below 1, got 1.0"),
        ({"partial_rotary_factor": 0.334}, r"`audio_config.partial_rotary_factor`: expected an even number .* 0.334"),
        ({"rope_theta": 0}, r"`audio_config.rope_theta`: expected a positive number, got 0"),
        ({"hidden_act": "x"}, r"`audio_config.hidden_act`: expected an activation of Transformers, got 'x'"),
        ({"input_local_dim": "1024"}, r"hidden_size.* expected int, got str"),
        ({"out_hidden_size": 64}, r"`audio_config.out_hidden_size`: expected hidden_size=4096, got 64"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_contradiction_names_field_expected_and_got(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        MiMoV2Config.from_dict({**RELEASED, "audio_config": {**AUDIO, **changes}})
    if "audio_config" in message:
        assert "\n" not in str(raised.value)
