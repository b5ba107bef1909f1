"""The vision part of config.json: both spellings, every key kept, contradictions by name."""

import json
from pathlib import Path

import pytest

import modeling_mimo
from modeling_mimo import MiMoV2Config
from modeling_mimo.configuration_mimo_v2_vision import MiMoV2VisionConfig


RELEASED = json.loads((Path(modeling_mimo.__file__).parent / "data/MiMo-V2.5/config.json").read_text())


def test_the_released_spelling():
    config = MiMoV2VisionConfig(**RELEASED["vision_config"])
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_channels) == (28, 32, 3)
    assert config.sliding_window == 64
    runs = ["full", *["row"] * 4, *["column"] * 4] * 3
    assert config.block_types == [*runs, "full"]
    assert not [name for name in ("depth", "num_heads", "in_chans", "vit_window_attn_types") if hasattr(config, name)]


def test_the_defaults_are_those_of_v2_5():
    assert (
        MiMoV2VisionConfig().to_dict() | RELEASED["vision_config"]
        == MiMoV2VisionConfig(**RELEASED["vision_config"]).to_dict()
    )


def test_every_key_survives_two_rounds():
    config = MiMoV2VisionConfig(**RELEASED["vision_config"])
    for _ in range(2):
        written = json.loads(json.dumps(config.to_dict()))
        assert {key: written[key] for key in RELEASED["vision_config"]} == RELEASED["vision_config"]
        config = MiMoV2VisionConfig(**written)


def test_an_unchanged_tower_is_written_as_it_was_read_and_a_changed_one_is_not(tmp_path):
    config = MiMoV2Config.from_dict(RELEASED)
    assert isinstance(config.vision_config, MiMoV2VisionConfig)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["vision_config"] == RELEASED["vision_config"]
    assert "load_towers" not in written
    config.vision_config.sink_type = "null_logit"
    config.save_pretrained(tmp_path)
    again = MiMoV2Config.from_pretrained(tmp_path)
    assert again.vision_config.sink_type == "null_logit"
    assert again.vision_config.block_types == config.vision_config.block_types


def test_the_switch_is_remembered(tmp_path):
    MiMoV2Config.from_dict(RELEASED, load_towers=False).save_pretrained(tmp_path)
    again = MiMoV2Config.from_pretrained(tmp_path)
    assert again.load_towers is False
    assert again.vision_config is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 12}, r"`vision_config.depth`: expected num_hidden_layers=12, got 28"),
        ({"depth": 27}, r"`vision_config.block_types`: expected 27 names"),
        ({"vit_window_attn_types": [2] * 28}, r"`vision_config.vit_window_attn_types`: expected codes .* got 2"),
        ({"fullatt_block_indexes": [0, 9]}, r"`vision_config.fullatt_block_indexes`: expected \[0, 9, 18, 27\]"),
        ({"num_heads": 30}, r"`vision_config.num_attention_heads`: expected a multiple of .*=8, got 30"),
        ({"num_query_groups": 2}, r"`vision_config.num_query_groups`: expected 4, got 2"),
        ({"spatial_patch_size": 14}, r"`vision_config.spatial_patch_size`: expected 16, got 14"),
        ({"visual_token_window_size": 0}, r"`vision_config.sliding_window`: expected at least 1, got 0"),
        ({"head_dim": 62}, r"`vision_config.head_dim`: expected a multiple of 4, got 62"),
        ({"sink_type": "x"}, r"`vision_config.sink_type`: expected one of \['first_key', 'null_logit'\], got 'x'"),
        ({"hidden_act": "x"}, r"`vision_config.hidden_act`: expected an activation of Transformers, got 'x'"),
        ({"hidden_size": "1280"}, r"hidden_size.* expected int, got str"),
        ({"out_hidden_size": 64}, r"`vision_config.out_hidden_size`: expected hidden_size=4096, got 64"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_contradiction_names_field_expected_and_got(changes, message):
    with pytest.raises(ValueError, match=message):
        MiMoV2Config.from_dict({**RELEASED, "vision_config": {**RELEASED["vision_config"], **changes}})


@pytest.mark.parametrize("name", ["image_token_id", "video_token_id"])
def test_a_tower_needs_the_ids_of_its_placeholders(name):
    with pytest.raises(ValueError, match=f"`{name}`: expected the id of a placeholder"):
        MiMoV2Config.from_dict({**RELEASED, name: None})
