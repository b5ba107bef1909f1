import math

import pytest

from modeling_mimo.cli.releases import RELEASES, shipped_config, shipped_manifest, shipped_names
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors


def described(config):
    """Every tensor of an FP8 release as the table has it: name -> (dtype, shape)."""
    result = {}
    for name, spec in released_tensors(config).items():
        if spec.quantized:
            result[name] = ("F8_E4M3", spec.shape)
            result[f"{name}_scale_inv"] = ("F32", spec.scale_shape)
        else:
            result[name] = ("F32" if spec.part == "router" else "BF16", spec.shape)
    return result


def totals(tensors):
    width = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    elements = [(dtype, math.prod(shape)) for dtype, shape in tensors.values()]
    return len(tensors), sum(count for _, count in elements), sum(width[dtype] * count for dtype, count in elements)


def test_all_73081_tensors_of_the_release_both_ways():
    manifest = {name: (info.dtype, info.shape) for name, info in shipped_manifest("MiMo-V2.5").items()}
    assert len(manifest) == 73_081
    assert described(shipped_config("MiMo-V2.5")) == manifest


@pytest.mark.parametrize("name", ["MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2-Flash"])
def test_totals_of_the_releases(name):
    release = RELEASES[name]
    assert totals(described(shipped_config(name))) == (release.tensors, release.elements, release.bytes)
    table = released_tensors(shipped_config(name))
    assert sum(math.prod(spec.shape) for spec in table.values()) == release.parameters


def test_totals_of_pro_as_reported():
    tensors, elements, size = totals(described(shipped_config("MiMo-V2.5-Pro")))
    assert (tensors, elements, f"{size / 2**30:.2f}") == (159_581, 1_023_244_718_976, "962.40")


def test_parts_of_v2_5_as_published():
    elements, scales = {}, {"main": 0, "mtp": 0}
    for spec in released_tensors(shipped_config("MiMo-V2.5")).values():
        elements[spec.part] = elements.get(spec.part, 0) + math.prod(spec.shape)
        if spec.quantized:
            scales["mtp" if spec.part == "mtp" else "main"] += math.prod(spec.scale_shape)
    assert elements == {
        "embeddings": 1_249_902_592,
        "norms": 397_312,
        "attention": 2_872_049_664 + 1_610_612_736,
        "sinks": 2_496,
        "dense_mlp": 201_326_592,
        "router": 49_295_104,
        "experts": 302_795_194_368,
        "mtp": 987_820_224,
        "vision": 728_594_432,
        "audio": 261_127_168,
    }
    assert scales == {"main": 18_669_312, "mtp": 48_000}


@pytest.mark.parametrize("name", shipped_names())
def test_heads_are_loaded_under_their_released_names(name):
    heads = {tensor: spec for tensor, spec in released_tensors(shipped_config(name)).items() if spec.part == "mtp"}
    assert all(spec.target == tensor for tensor, spec in heads.items())
    assert {tensor.rsplit(".", 1)[0].split(".", 4)[4] for tensor, spec in heads.items() if not spec.quantized} == {
        *("enorm", "hnorm", "eh_proj", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"),
        *("self_attn.o_proj", "self_attn"),
    }


@pytest.mark.parametrize(("layout", "rows"), [("chunked", 108), ("plain", 106)])
def test_scale_rows_of_a_global_layer(layout, rows):
    table = released_tensors(shipped_config("MiMo-V2.5"), layout)
    assert table["model.layers.5.self_attn.qkv_proj.weight"].scale_shape == (rows, 32)
    assert table["model.layers.1.self_attn.qkv_proj.weight"].scale_shape == (116, 32)


def test_mxfp4_totals_follow_from_the_same_table():
    """V2.6-Flash-RL is omni, its shipped config is not: V2.5's config describes its tensors."""
    totals = {"U8": 0, "F8_E4M3": 0, "F32": 0, "BF16": 0}
    for name, spec in released_tensors(shipped_config("MiMo-V2.5")).items():
        count = math.prod(spec.shape)
        if spec.part == "experts":
            totals["U8"] += count // 2 + count // 32
        elif spec.quantized:
            totals["F8_E4M3"] += count
            totals["F32"] += math.prod(spec.scale_shape)
        else:
            totals["F32" if name.endswith("e_score_correction_bias") else "BF16"] += count
    assert totals == {"BF16": 4_101_308_032, "F32": 248_192, "F8_E4M3": 3_859_808_256, "U8": 160_859_947_008}
    assert RELEASES["MiMo-V2.6-Flash-RL"].elements == sum(totals.values())


def test_configs_and_names_that_are_shipped():
    assert shipped_names() == ["MiMo-V2-Flash", "MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2.6-Flash-RL"]
    assert shipped_manifest("MiMo-V2.5-Pro") is None
    flash = shipped_config("MiMo-V2-Flash")
    assert flash.attention_projection_layout == "split"
    assert flash.rope_parameters["full_attention"]["rope_theta"] == 5_000_000
    assert flash.max_position_embeddings == 262_144
    with pytest.raises(ValueError, match="or one of MiMo-V2-Flash, MiMo-V2"):
        shipped_config("MiMo-V9")
