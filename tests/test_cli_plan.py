import json
import math

import pytest
import torch
from accelerate.utils import compute_module_sizes
from safetensors.torch import save_file

from modeling_mimo.cli.main import main
from modeling_mimo.cli.plan import parse_tokens, plan_activations, plan_kv, verdict
from modeling_mimo.cli.plan_placement import meta_model
from modeling_mimo.cli.releases import DATA, RELEASES, shipped_config, shipped_names
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors


GIB = 2**30


def plan_json(capsys, *args):
    assert main(["plan", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "tokens"), [("32768", 32768), ("256K", 262_144), ("256k", 262_144), ("1M", 1_048_576), ("1", 1)]
)
def test_tokens(text, tokens):
    assert parse_tokens(text, "--context") == tokens


@pytest.mark.parametrize("text", ["", "K", "0", "0K", "-1", "1G", "1.5K", "1e3", "²"])
def test_tokens_that_are_none(text):
    with pytest.raises(ValueError, match="--context: expected a positive number of tokens"):
        parse_tokens(text, "--context")


def test_kv_of_v2_5_at_256k(capsys):
    plan = plan_json(capsys, "MiMo-V2.5", "--context", "256K")
    kv = plan["kv"]
    # 9 global layers of 4 heads, 39 sliding ones of 8 heads and 128 + 64 rows; 320 dims, 2 bytes
    assert kv["full_attention"] == 9 * 262_144 * 4 * 320 * 2
    assert kv["sliding_attention"] == 39 * 192 * 8 * 320 * 2
    assert kv["total"] == kv["full_attention"] + kv["sliding_attention"] <= 5.7 * GIB
    assert 54 * GIB < kv["all_full"] < 55 * GIB


def test_kv_scales_with_batch_and_context_where_it_should():
    config = shipped_config("MiMo-V2.5")
    one, more, longer = (plan_kv(config, *args, 2) for args in ((4096, 1), (4096, 3), (8192, 1)))
    assert [more[key] for key in ("total", "all_full")] == [3 * one[key] for key in ("total", "all_full")]
    assert longer["sliding_attention"] == one["sliding_attention"]
    assert longer["full_attention"] == 2 * one["full_attention"]


def test_fp8_weights_of_v2_5(capsys):
    weights = plan_json(capsys, "MiMo-V2.5")["weights"]
    assert (weights["dtype"], weights["source"]) == ("fp8", "headers")
    assert sum(weights["parts"].values()) == 315_031_102_208
    # 9 global layers, 4 chunks of 3392 rows that become 3456, 4096 columns
    assert weights["qkv_padding"] == 9 * 4 * 64 * 4096
    assert weights["total"] == sum(weights["parts"].values()) + weights["qkv_padding"]
    assert weights["parts"]["mtp"] == 1_189_400_448
    assert weights["parts"]["experts"] == 302_795_194_368 + 4 * 302_795_194_368 // 128**2


def test_headers_and_table_agree(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((DATA / "MiMo-V2.5" / "config.json").read_bytes())
    by_config = plan_json(capsys, tmp_path)["weights"]
    by_headers = plan_json(capsys, "MiMo-V2.5")["weights"]
    assert (by_config.pop("source"), by_headers.pop("source")) == ("config", "headers")
    assert by_config == by_headers


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_dequantized_weights_with_an_fp32_router(capsys, dtype, width):
    weights = plan_json(capsys, "MiMo-V2-Flash", "--dtype", dtype)["weights"]
    assert weights["qkv_padding"] == 0
    assert weights["parts"]["router"] == 4 * 49_295_104
    assert weights["total"] == width * 309_766_601_088 + (4 - width) * 49_295_104


def test_pro_is_planned_from_its_config(capsys):
    plan = plan_json(capsys, "MiMo-V2.5-Pro")
    weights = plan["weights"]
    assert weights["source"] == "config"
    assert sum(weights["parts"].values()) == RELEASES["MiMo-V2.5-Pro"].bytes
    # all 70 layers and 3 heads have 8 chunks of 3392 rows
    assert weights["qkv_padding"] == 73 * 8 * 64 * 6144
    assert plan["context"] == 1_048_576


def test_the_total_is_the_sum_of_what_is_printed(capsys):
    plan = plan_json(capsys, "MiMo-V2-Flash", "--context", "128K", "--batch", "2")
    assert plan["total"] == (
        plan["weights"]["total"] + plan["kv"]["total"] + plan["kv"]["reserve"] + plan["activations"]["total"]
    )
    assert plan["kv"]["reserve"] == plan["kv"]["full_attention"] // 8
    assert all("formula" in plan[part] for part in ("weights", "kv", "activations"))
    assert plan["machine"]["ram"] > 0
    assert plan["verdict"] == verdict(plan["total"], **plan["machine"])


def test_activations_follow_their_formula():
    config = shipped_config("MiMo-V2.5")
    parts = plan_activations(config, 2**18, 1, 4096, 2, True)
    assert parts["hidden"] == 4 * 4096 * (2 * 4096 + 4 * 8 * 4096)
    assert parts["mask"] == 512 * 2**18 * 2
    assert parts["logits"] == 4 * 152_576
    assert parts["dequantized_weight"] == 16384 * 4096 * 2
    assert parts["total"] == sum(parts[key] for key in ("hidden", "mask", "logits", "dequantized_weight"))
    assert plan_activations(config, 2**18, 1, 4096, 2, False)["dequantized_weight"] == 0
    assert plan_activations(config, 2**18, 3, 4096, 2, False)["hidden"] == 3 * parts["hidden"]


@pytest.mark.parametrize(
    ("needed", "ram", "gpus", "expected"),
    [
        (5, 5, [], "fits in RAM"),
        (5, 0, [3, 2], "fits on 2 GPUs"),
        (5, 9, [5], "fits on 1 GPU"),
        (5, 5, [4], "fits in RAM"),
        (5, 3, [2], "fits across GPUs and RAM"),
        (5 * GIB, 3 * GIB, [GIB], "does not fit: needs 5.00 GiB, has 4.00 GiB"),
        (2 * GIB, GIB, [], "does not fit: needs 2.00 GiB, has 1.00 GiB"),
    ],
)
def test_verdicts(needed, ram, gpus, expected):
    assert verdict(needed, ram, [{"name": "gpu", "bytes": size} for size in gpus]) == expected


def test_text_says_the_same(capsys):
    plan = plan_json(capsys, "MiMo-V2-Flash", "--context", "256K")
    assert main(["plan", "MiMo-V2-Flash", "--context", "256K"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "MiMo-V2-Flash: 1 x 262,144 tokens, prefill by 4,096"
    rows = {line[:40].strip(): line[40:].strip() for line in lines}
    assert rows["KV cache"] == "5.66 GiB"
    assert rows["if all layers were global, instead"] == "54.38 GiB"
    assert rows["total"] == f"{plan['total'] / GIB:,.2f} GiB"
    assert lines[-1].startswith(plan["verdict"].split(",")[0])


def test_a_small_folder_with_files(tmp_path, capsys):
    config = MiMoV2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        v_head_dim=4,
        n_routed_experts=2,
        num_experts_per_tok=1,
        num_mtp_layers=0,
    )
    config.save_pretrained(tmp_path)
    table = released_tensors(config)
    tensors = {name: torch.zeros(spec.shape, dtype=torch.bfloat16) for name, spec in table.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    plan = plan_json(capsys, tmp_path, "--context", "1K")
    assert (plan["weights"]["dtype"], plan["weights"]["source"]) == ("bf16", "headers")
    assert plan["weights"]["total"] == 2 * sum(math.prod(spec.shape) for spec in table.values())
    assert plan["verdict"].startswith("fits ")
    # files without draft heads need no word about it in config.json
    written = json.loads((tmp_path / "config.json").read_text())
    del written["num_nextn_predict_layers"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert plan_json(capsys, tmp_path, "--context", "1K")["weights"] == plan["weights"]
    assert main(["plan", str(tmp_path), "--dtype", "fp8"]) == 2
    assert "--dtype: expected bf16, fp16 or fp32" in capsys.readouterr().err
    # an incomplete folder is not planned
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["plan", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == "mimo: error: the files do not match the config; missing (1): lm_head.weight\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["MiMo-V2.5-Pro", "--context", "2M"], "expected at most max_position_embeddings=1048576 tokens, got 2097152"),
        (["MiMo-V2-Flash", "--context", "257K"], "expected at most max_position_embeddings=262144 tokens"),
        (["MiMo-V2-Flash", "--context", "many"], "--context: expected a positive number of tokens"),
        (["MiMo-V2-Flash", "--prefill-chunk", "0"], "--prefill-chunk: expected a positive number of tokens"),
        (["MiMo-V2-Flash", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["MiMo-V2-Flash", "--gpu-mem", "80"], "--gpu-mem: expected sizes such as 80GB or 24GiB,24GiB, got '80'"),
        (["MiMo-V2-Flash", "--cpu-mem", "1GB,2GB"], "--cpu-mem: expected one size, got '1GB,2GB'"),
        (["MiMo-V9"], "expected a folder, a .safetensors file or one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(capsys, args, message):
    assert main(["plan", *args]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("mimo: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", [*shipped_names(), "tiny"])
def test_the_plan_and_accelerate_agree_within_five_percent(checkpoints, tmp_path, capsys, name, dtype):
    folder = DATA / name if name != "tiny" else checkpoints["fp8_omni"]
    # the config alone: no headers, no files
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = plan_json(capsys, tmp_path, "--dtype", dtype)["weights"]
    model = meta_model(MiMoV2Config.from_pretrained(tmp_path), dtype)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    estimate = compute_module_sizes(model)[""]
    assert abs(weights["total"] / estimate - 1) < 0.05
    # and without the rows that FP8 kernels need beside, within a thousandth
    assert abs((weights["total"] - weights["qkv_padding"]) / estimate - 1) < 0.001


def test_the_releases_are_all_planned():
    assert {"MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2-Flash", "MiMo-V2.6-Flash-RL"} <= set(shipped_names())


# 8 of 256 experts in 47 layers, FP8 with scales
EXPERTS_PER_TOKEN = 8 * 47 * 3 * (4096 * 2048 + 4 * 32 * 16)


def test_what_a_token_fetches_of_v2_5(capsys):
    plan = plan_json(capsys, "MiMo-V2.5", "--gpu-mem", "24GB", "--cpu-mem", "64GB")["placement"]
    experts = plan["experts"]
    assert experts["per_token"] == {"cpu": 0, "disk": EXPERTS_PER_TOKEN}
    assert experts["fits"]
    assert experts["devices"]["disk"] == 302_795_194_368 + 4 * 302_795_194_368 // 128**2
    assert 12e9 < experts["devices"]["0"] < 12.5e9
    auto = plan["auto"]
    assert auto["devices"]["0"] <= 24e9
    assert auto["devices"]["cpu"] <= 64e9
    assert sum(auto["devices"].values()) == pytest.approx(315_031_102_208, rel=1e-6)
    # whole layers are elsewhere: their attention is fetched as well
    assert sum(auto["per_token"].values()) > EXPERTS_PER_TOKEN


def test_experts_that_fit_into_cpu_memory_need_no_disk(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((DATA / "MiMo-V2.5" / "config.json").read_bytes())
    plan = plan_json(capsys, tmp_path, "--gpu-mem", "24GB", "--cpu-mem", "400GB")["placement"]["experts"]
    assert plan["per_token"] == {"cpu": EXPERTS_PER_TOKEN, "disk": 0}
    # dequantized they do not, and are read as FP8 all the same
    plan = plan_json(capsys, tmp_path, "--gpu-mem", "24GB", "--cpu-mem", "400GB", "--dtype", "bf16")["placement"]
    assert plan["experts"]["per_token"] == {"cpu": 0, "disk": EXPERTS_PER_TOKEN}
    # nothing is fetched from where it computes
    plan = plan_json(capsys, tmp_path, "--cpu-mem", "400GB")["placement"]
    assert plan["auto"]["per_token"] == {"cpu": 0, "disk": 0}
    assert plan["experts"]["per_token"]["disk"] == EXPERTS_PER_TOKEN
    assert not plan_json(capsys, tmp_path, "--gpu-mem", "8GB,8GB")["placement"]["experts"]["fits"]


def test_a_placement_from_headers_and_from_the_config_agree(checkpoints, tmp_path, capsys):
    for name in ("fp8_omni", "mxfp4", "bf16_fused"):
        (tmp_path / "config.json").write_bytes((checkpoints[name] / "config.json").read_bytes())
        by_config, by_headers = (
            plan_json(capsys, path, "--cpu-mem", "8MB")["placement"] for path in (tmp_path, checkpoints[name])
        )
        assert by_config == by_headers
        assert by_headers["auto"]["devices"]["disk"] > 0


def test_text_shows_the_placement(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((DATA / "MiMo-V2.5" / "config.json").read_bytes())
    assert main(["plan", str(tmp_path), "--gpu-mem", "8GB", "--cpu-mem", "64GB"]) == 0
    out, error = capsys.readouterr()
    rows = {line[:40].strip(): line[40:].strip() for line in out.splitlines()}
    assert rows["expert_device_map, fetched per token"] == f"{EXPERTS_PER_TOKEN / GIB:,.2f} GiB"
    assert rows["on disk"] == "282.07 GiB"
    assert "expert_device_map: what is no expert does not fit where it computes" in out.splitlines()
    # accelerate's warnings of GPUs that are not here
    assert error == ""


def test_mxfp4_experts_are_planned_as_stored_and_dequantized(capsys):
    weights = plan_json(capsys, "MiMo-V2.6-Flash-RL")["weights"]
    # all that is U8 in the release
    assert weights["parts"]["experts"] == 160_859_947_008
    weights = plan_json(capsys, "MiMo-V2.6-Flash-RL", "--dtype", "bf16")["weights"]
    assert weights["parts"]["experts"] == 2 * 302_795_194_368
