"""The configuration: reads every released spelling, writes back what it read, refuses contradictions by name."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_dict
from transformers import AutoConfig
from transformers.models.mimo_v2_flash import MiMoV2FlashConfig

import modeling_mimo
from modeling_mimo import MiMoV2Config


DATA = Path(modeling_mimo.__file__).parent / "data"
RELEASES = ["MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2.6-Flash-RL", "MiMo-V2-Flash"]

# spellings of the released files that must not be attributes
VENDOR_NAMES = [
    "hybrid_layer_pattern",
    "moe_layer_freq",
    "layernorm_epsilon",
    "num_nextn_predict_layers",
    "sliding_window_size",
    "rope_theta",
    "swa_rope_theta",
    "partial_rotary_factor",
    "scoring_func",
    "topk_method",
    "n_shared_experts",
    "attention_chunk_size",
    "hybrid_block_size",
    "vision_model_type",
]


ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.334}


def read(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def raw(name, **changes):
    return {**read(DATA / name), **changes}


def without(name, *fields):
    return {key: value for key, value in read(DATA / name).items() if key not in fields}


def saved(config, folder):
    config.save_pretrained(folder)
    return read(folder)


def exact(value):
    """Equal only if ints stay ints and floats floats."""
    return json.dumps(value, sort_keys=True)


def assert_same_file(got, expected):
    assert got.keys() == expected.keys()
    for key in expected:
        if key != "transformers_version":
            assert exact(got[key]) == exact(expected[key]), key


def attributes(config):
    hidden = ("_source", "_as_read", "_assumes_mtp_layers", "_name_or_path", "transformers_version", "_commit_hash")
    return {key: value for key, value in config.__dict__.items() if key not in hidden}


def global_layers(config):
    return [index for index, name in enumerate(config.layer_types) if name == "full_attention"]


# Reading ----------------------------------------------------------------------------------------------------------


def test_v2_5():
    config = MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5")
    assert global_layers(config) == [0, 5, 11, 17, 23, 29, 35, 41, 47]
    assert config.mlp_layer_types == ["dense"] + ["sparse"] * 47
    assert tuple(config.attention_geometry("full_attention")) == (64, 4, 192, 128, None, False, 4)
    assert tuple(config.attention_geometry("sliding_attention")) == (64, 8, 192, 128, 128, True, 4)
    assert config.attention_geometry("full_attention").qkv_sizes == (12288, 768, 512)
    assert config.attention_geometry("sliding_attention").qkv_sizes == (12288, 1536, 1024)
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e7
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert config.attention_value_scale == 0.707
    assert config.attention_projection_layout == "fused_qkv"
    assert config.routed_scaling_factor == 1.0
    assert config.num_mtp_layers == 3
    assert config.dtype == torch.bfloat16
    assert config.vision_config.sliding_window == 64
    assert config.audio_config.audio_channels == 20
    assert (config.audio_token_id, config.audio_start_token_id, config.audio_end_token_id) == (151669, 151673, 151674)
    assert config.processor_config["patch_size"] == 16


@pytest.mark.parametrize(("name", "is_in_file"), [("MiMo-V2.5", False), ("MiMo-V2.6-Flash-RL", True)])
def test_the_number_of_heads_is_written_only_where_it_was(name, is_in_file, tmp_path):
    assert ("num_nextn_predict_layers" in read(DATA / name)) == is_in_file
    config = MiMoV2Config.from_pretrained(DATA / name)
    written = saved(config, tmp_path)
    assert ("num_nextn_predict_layers" in written) == is_in_file
    assert "load_mtp" not in written
    # what the files decided is written
    config.num_mtp_layers = 1
    assert saved(config, tmp_path)["num_nextn_predict_layers"] == 1
    assert MiMoV2Config.from_pretrained(tmp_path).num_mtp_layers == 1


def test_a_config_without_loaded_heads_is_saved_as_one(tmp_path):
    config = MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5", load_mtp=False)
    assert saved(config, tmp_path)["load_mtp"] is False
    again = MiMoV2Config.from_pretrained(tmp_path)
    assert (again.load_mtp, again.num_mtp_layers) == (False, 3)


def test_pro():
    config = MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5-Pro")
    assert global_layers(config) == [0, 7, 15, 23, 31, 39, 47, 55, 62, 69]
    assert tuple(config.attention_geometry("full_attention")) == (128, 8, 192, 128, None, False, 8)
    assert tuple(config.attention_geometry("sliding_attention")) == (128, 8, 192, 128, 128, True, 8)
    assert (config.hidden_size, config.n_routed_experts, config.attention_value_scale) == (6144, 384, 0.612)
    assert config.vision_config is None


def test_v2_6():
    config = MiMoV2Config.from_pretrained(DATA / "MiMo-V2.6-Flash-RL")
    assert config.moe_router_dtype == "bfloat16"
    assert config.rms_norm_eps == 1e-6
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e7
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert config.rope_parameters["sliding_attention"]["partial_rotary_factor"] == 0.334


def test_v2_flash():
    config = MiMoV2Config.from_pretrained(DATA / "MiMo-V2-Flash")
    assert config.attention_projection_layout == "split"
    assert tuple(config.attention_geometry("sliding_attention")) == (64, 8, 192, 128, 128, True, 4)
    assert config.rope_parameters["full_attention"]["rope_theta"] == 5e6
    assert config.moe_router_dtype == "float32"
    assert config.max_position_embeddings == 262144


def test_transformers_own_spelling_of_v2_flash(tmp_path):
    theirs = MiMoV2FlashConfig(num_hidden_layers=6, sliding_window=65, rms_norm_eps=3e-6)
    theirs.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MiMoV2Config
    for field in ("layer_types", "mlp_layer_types", "rms_norm_eps", "rope_parameters", "attention_value_scale"):
        assert getattr(config, field) == getattr(theirs, field)
    # their window counts the query, whatever the key of the hub file means to them
    assert config.sliding_window == 65
    assert config.attention_projection_layout == "split"
    # they double the KV heads of sliding layers without a key for it
    assert config.swa_num_key_value_heads == 2 * config.num_key_value_heads
    assert attributes(MiMoV2Config.from_dict(saved(config, tmp_path / "again"))) == attributes(config)


def test_transformers_own_spelling_changed_and_saved(tmp_path):
    MiMoV2FlashConfig(num_hidden_layers=6).save_pretrained(tmp_path)
    config = MiMoV2Config.from_pretrained(tmp_path, rms_norm_eps=3e-6)
    config.save_pretrained(tmp_path / "again")
    assert MiMoV2Config.from_pretrained(tmp_path / "again").rms_norm_eps == 3e-6


@pytest.mark.parametrize("name", RELEASES)
def test_no_vendor_spelling_is_an_attribute(name):
    config = MiMoV2Config.from_pretrained(DATA / name)
    assert [field for field in VENDOR_NAMES if hasattr(config, field)] == []


# Writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASES)
def test_saving_keeps_every_key_and_value_and_so_does_a_second_round(name, tmp_path):
    config = MiMoV2Config.from_pretrained(DATA / name)
    first = saved(config, tmp_path / "first")
    assert_same_file(first, read(DATA / name))
    again = MiMoV2Config.from_pretrained(tmp_path / "first")
    assert attributes(again) == attributes(config)
    assert_same_file(saved(again, tmp_path / "second"), first)


def test_keys_that_nobody_knows_are_kept(tmp_path):
    config = MiMoV2Config.from_dict(tiny_dict(somebody_elses_key={"a": [1, 2.5, None]}))
    assert saved(config, tmp_path)["somebody_elses_key"] == {"a": [1, 2.5, None]}


def test_a_changed_value_is_written_in_the_released_spelling_and_nothing_else_changes(tmp_path):
    config = MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5", rms_norm_eps=3e-6)
    assert config.rms_norm_eps == 3e-6
    expected = raw("MiMo-V2.5", layernorm_epsilon=3e-6)
    assert_same_file(saved(config, tmp_path), expected)
    config.num_experts_per_tok = 4
    config.attention_value_scale = 0.5
    assert_same_file(saved(config, tmp_path), {**expected, "num_experts_per_tok": 4, "attention_value_scale": 0.5})


def test_a_config_made_from_nothing_survives_saving(tmp_path):
    config = MiMoV2Config(num_hidden_layers=13, rms_norm_eps=2e-5, swa_num_key_value_heads=8)
    written = saved(config, tmp_path)
    assert written["hybrid_layer_pattern"] == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    assert written["layernorm_epsilon"] == 2e-5
    assert written["sliding_window_size"] == written["sliding_window"] == 128
    again = MiMoV2Config.from_pretrained(tmp_path)
    assert {key: value for key, value in attributes(again).items() if key in attributes(config)} == attributes(config)


def test_the_quantization_entry_is_written_as_other_engines_read_it(tmp_path):
    entry = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    # under its own name while loaded, so that Transformers' FP8 quantizer does not take it
    config = MiMoV2Config(quantization_config=entry)
    assert config.quantization_config["quant_method"] == "mimo_v2_fp8"
    assert saved(config, tmp_path)["quantization_config"] == entry
    config = MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5")
    config.quantization_config["fmt"] = "changed"
    written = saved(config, tmp_path)["quantization_config"]
    assert (written["quant_method"], written["fmt"]) == ("fp8", "changed")


def test_defaults_are_v2_5():
    default, released = MiMoV2Config(), MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5")
    for field in (
        "layer_types",
        "mlp_layer_types",
        "attention_value_scale",
        "vocab_size",
        "hidden_size",
        "v_head_dim",
    ):
        assert getattr(default, field) == getattr(released, field)


# The window switch ------------------------------------------------------------------------------------------------


def test_the_129_reading(tmp_path):
    config = MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5", sliding_window_includes_query=False)
    assert config.sliding_window == config.attention_geometry("sliding_attention").window == 129
    written = saved(config, tmp_path)
    assert_same_file(written, raw("MiMo-V2.5", sliding_window_includes_query=False))
    assert MiMoV2Config.from_pretrained(tmp_path).sliding_window == 129
    assert MiMoV2Config.from_pretrained(tmp_path, sliding_window_includes_query=True).sliding_window == 128
    assert MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5").sliding_window == 128


def test_the_129_reading_of_a_changed_window(tmp_path):
    config = MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5", sliding_window_includes_query=False)
    config.sliding_window = 65
    written = saved(config, tmp_path)
    assert (written["sliding_window"], written["sliding_window_size"]) == (64, 64)
    assert MiMoV2Config.from_pretrained(tmp_path).sliding_window == 65


# Overrides --------------------------------------------------------------------------------------------------------


def test_overrides_by_canonical_name():
    config, unused = MiMoV2Config.from_pretrained(
        DATA / "MiMo-V2.5", num_experts_per_tok=4, fused_qkv_layout="plain", return_unused_kwargs=True, nonsense=1
    )
    assert (config.num_experts_per_tok, config.fused_qkv_layout, unused) == (4, "plain", {"nonsense": 1})


def test_an_override_that_contradicts_the_file_is_refused():
    with pytest.raises(ValueError, match=r"`num_experts_per_tok`: expected 1 to n_routed_experts=256, got 300"):
        MiMoV2Config.from_pretrained(DATA / "MiMo-V2.5", num_experts_per_tok=300)


# Contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_layer_pattern": [0, 1]}, r"`hybrid_layer_pattern`: expected .*num_hidden_layers=48.* got 2 entries"),
        ({"hybrid_layer_pattern": "01" * 24}, r"`hybrid_layer_pattern`: expected .*list.* got '0101"),
        ({"hybrid_layer_pattern": None}, r"`hybrid_layer_pattern`: expected .* got None"),
        ({"hybrid_layer_pattern": [0] * 47 + [2]}, r"`hybrid_layer_pattern\[47\]`: expected one of \[0, 1\], got 2"),
        ({"moe_layer_freq": [1] * 49}, r"`moe_layer_freq`: expected .*num_hidden_layers=48.* got 49 entries"),
        ({"moe_layer_freq": [1] * 47 + ["x"]}, r"`moe_layer_freq\[47\]`: expected one of \[0, 1\], got 'x'"),
        ({"num_hidden_layers": 47}, r"`hybrid_layer_pattern`: expected .*num_hidden_layers=47.* got 48 entries"),
        ({"num_key_value_heads": 5}, r"`num_attention_heads`: expected a multiple of num_key_value_heads=5, got 64"),
        ({"num_key_value_heads": 0}, r"`num_key_value_heads`: expected at least 1, got 0"),
        ({"swa_num_attention_heads": 0}, r"`swa_num_attention_heads`: expected at least 1, got 0"),
        ({"head_dim": -1}, r"`head_dim`: expected at least 1, got -1"),
        ({"hybrid_layer_pattern": [[0]] * 48}, r"`hybrid_layer_pattern\[0\]`: expected one of \[0, 1\], got \[0\]"),
        ({"n_group": 4, "num_experts_per_tok": 65}, r"`num_experts_per_tok`: expected at most the 64 .* got 65"),
        ({"hidden_act": "x"}, r"`hidden_act`: expected an activation .* got 'x'"),
        ({"rope_theta": "x"}, r"rope_theta'\]`: expected a number, got 'x'"),
        ({"rope_scaling": "x"}, r"`rope_scaling`: expected a dictionary or nothing, got 'x'"),
        ({"partial_rotary_factor": 1.5}, r"`partial_rotary_factor`: expected .* at most the head_dim=192 .* got 288"),
        ({"quantization_config": "x"}, r"`quantization_config`: expected a dictionary or nothing, got 'x'"),
        ({"swa_num_attention_heads": 60}, r"`swa_num_attention_heads`: expected a multiple of .*=8, got 60"),
        ({"swa_num_key_value_heads": 2}, r"`swa_num_key_value_heads`: expected a multiple of the 4 chunks .* got 2"),
        ({"scoring_func": "softmax"}, r"`scoring_func`: expected one of \['sigmoid'\].* got 'softmax'"),
        ({"topk_method": "greedy"}, r"`topk_method`: expected one of \['noaux_tc'\].* got 'greedy'"),
        ({"n_shared_experts": 1}, r"`n_shared_experts`: expected .* got 1"),
        ({"n_group": 3}, r"`n_group`: expected a divisor of n_routed_experts=256 .* got 3"),
        ({"n_group": 0}, r"`n_group`: expected .* got 0"),
        ({"topk_group": 2}, r"`n_group`: expected .*at least topk_group=2, got 1"),
        ({"num_experts_per_tok": 0}, r"`num_experts_per_tok`: expected 1 to n_routed_experts=256, got 0"),
        ({"num_experts_per_tok": 257}, r"`num_experts_per_tok`: expected 1 to n_routed_experts=256, got 257"),
        ({"sliding_window_size": 64}, r"`sliding_window_size`: expected the value of sliding_window=128, got 64"),
        ({"sliding_window": 0, "sliding_window_size": 0}, r"`sliding_window`: expected at least 1, got 0"),
        ({"moe_router_dtype": "float16"}, r"`moe_router_dtype`: expected one of .*'float32'.* got 'float16'"),
        ({"attention_projection_layout": "x"}, r"`attention_projection_layout`: expected one of .*'split'.* got 'x'"),
        ({"fused_qkv_layout": "x"}, r"`fused_qkv_layout`: expected one of .*'chunked'.* got 'x'"),
        ({"partial_rotary_factor": 0.001}, r"`partial_rotary_factor`: expected an even number .* got 0"),
        ({"partial_rotary_factor": 0.176}, r"`partial_rotary_factor`: expected an even number .* got 33"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_type'\]`: expected 'default'.* got 'yarn'"),
        ({"num_hidden_layers": "48"}, r"num_hidden_layers.* expected int, got str"),
        ({"hidden_size": 4096.5}, r"hidden_size.* expected int, got float"),
        ({"hidden_size": None}, r"hidden_size.* expected int, got NoneType"),
        ({"norm_topk_prob": "yes"}, r"norm_topk_prob.* expected bool, got str"),
        ({"layernorm_epsilon": "1e-5"}, r"rms_norm_eps.* expected float, got str"),
        ({"vision_config": [1]}, r"vision_config"),
        ({"audio_config": [1]}, r"audio_config"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_contradiction_names_field_expected_and_got(changes, message):
    with pytest.raises(ValueError, match=message):
        MiMoV2Config.from_dict(raw("MiMo-V2.5", **changes))


@pytest.mark.parametrize(
    "field",
    [
        "attention_value_scale",
        "rope_theta",
        "swa_rope_theta",
        "partial_rotary_factor",
        "hybrid_layer_pattern",
        "moe_layer_freq",
    ],
)
@pytest.mark.parametrize("name", ["MiMo-V2.5", "MiMo-V2-Flash"])
def test_what_a_released_file_must_say_is_never_guessed(field, name):
    with pytest.raises(ValueError, match=rf"`{field}`: expected .* in a released config.json, got nothing"):
        MiMoV2Config.from_dict(without(name, field))


def test_canonical_lists_are_checked_too():
    with pytest.raises(ValueError, match=r"`layer_types`: expected .*num_hidden_layers=2.* got 1 entries"):
        MiMoV2Config(num_hidden_layers=2, layer_types=["full_attention"])
    with pytest.raises(ValueError, match=r"`layer_types\[1\]`: expected one of .* got 'chunked_attention'"):
        MiMoV2Config(num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ValueError, match=r"rope_parameters\['sliding_attention'\]\['rope_type'\].* got nothing"):
        MiMoV2Config(rope_parameters={"full_attention": ROPE})


# An ordinary Python object ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(name, way, tmp_path):
    config = MiMoV2Config.from_pretrained(DATA / name)
    clone = way(config)
    assert type(clone) is MiMoV2Config
    assert attributes(clone) == attributes(config)
    assert_same_file(saved(clone, tmp_path), read(DATA / name))


def test_a_deep_copy_is_independent():
    config = tiny_config()
    clone = copy.deepcopy(config)
    clone.layer_types[0] = "sliding_attention"
    clone.rope_parameters["full_attention"]["rope_theta"] = 1.0
    assert config.layer_types[0] == "full_attention"
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e7


def test_reading_leaves_the_given_dictionary_alone():
    given = raw("MiMo-V2.5")
    MiMoV2Config.from_dict(given)
    assert given == raw("MiMo-V2.5")


@pytest.mark.parametrize("name", RELEASES)
def test_auto_config_needs_no_remote_code(name):
    assert type(AutoConfig.from_pretrained(DATA / name)) is MiMoV2Config


def test_both_model_types_are_registered():
    for model_type in ("mimo_v2", "mimo_v2_flash"):
        assert type(AutoConfig.for_model(model_type)) is MiMoV2Config


def test_transformers_names_for_the_experts():
    config = tiny_config()
    assert config.num_local_experts == config.num_experts == 8


def test_the_printed_form_is_json_in_the_released_spelling():
    printed = json.loads(tiny_config().to_json_string())
    assert printed["hybrid_layer_pattern"] == tiny_dict()["hybrid_layer_pattern"]
    assert "MiMoV2Config" in repr(tiny_config())
