"""Rank shards of a small checkpoint, cut here head by head and quantized on every rank, read back as the release."""

import argparse
import copy
import itertools
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_mimo import MiMoV2Config
from modeling_mimo.checkpoint_mimo_v2 import Checkpoint, check_tensors
from modeling_mimo.conversion import rank_layout
from modeling_mimo.conversion.checkpoint import open_source
from modeling_mimo.conversion.fp8 import quantize_blocks
from modeling_mimo.conversion.mxfp4 import quantize_mxfp4
from modeling_mimo.conversion.random_checkpoint import released_tensors_random, write_random_checkpoint
from modeling_mimo.conversion.rank_shards import RankSource, read_rank_layout
from modeling_mimo.conversion.torch_files import read_stored_rows, read_torch_header


pytestmark = pytest.mark.usefixtures("one_thread")

TP, EP, STAGES = 2, 2, (2, 3)
# parts of 256 and 128 rows: a rank's part of all but the fused projections ends where a scale block ends
SIZES = {
    "hybrid_layer_pattern": [0, 1, 1, 0, 1],
    "moe_layer_freq": [0, 1, 1, 1, 1],
    "num_hidden_layers": 5,
    "num_nextn_predict_layers": 1,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": 4,
}
LAYOUT = {
    "files": ["rank_tp{tp}_ep{ep}_pp{pp}.pt"],
    "ranks": {"tp": TP, "ep": EP, "pp": len(STAGES)},
    "ignore": [r"^optimizer\.", "^iteration$"],
    "rename": [
        [r"^model\.", ""],
        [r"^decoder\.", "model."],
        [r"^embedding\.", "model.embed_tokens."],
        [r"^output_layer\.", "lm_head."],
    ],
    "indices": [
        {"names": r"^model\.layers\.(\d+)\.", "rank": "pp", "per_rank": list(STAGES)},
        {"names": r"\.experts\.(\d+)\.", "rank": "ep", "per_rank": 2},
    ],
    "rules": [
        {"names": r"\.(o|down)_proj\.weight$", "join": "columns"},
        {"names": r"norm\.|eh_proj|mlp\.gate\.", "join": "same"},
        {"names": r"_proj\.|embed_tokens|lm_head|attention_sink_bias", "join": "rows"},
    ],
}
QKV = "model.layers.0.self_attn.qkv_proj.weight"
NORM = "model.layers.3.input_layernorm.weight"
EXPERT = "model.layers.3.mlp.experts.3.down_proj.weight"


# ---- an independent splitter


def local_tensors(tensors, dtype, rank):
    """What one rank of a trainer holds, by the trainer's names, from split and unquantized tensors."""
    tp, ep, pp = rank
    state = {}
    for name, tensor in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        first = sum(STAGES[:pp])
        if layer and not first <= int(layer[1]) < first + STAGES[pp]:
            continue
        if not layer and pp != (0 if "embed_tokens" in name else len(STAGES) - 1):
            continue
        if layer:
            name = name.replace(layer[0], f"model.layers.{int(layer[1]) - first}.")
        expert = re.search(r"experts\.(\d+)\.", name)
        if expert:
            if int(expert[1]) // 2 != ep:
                continue
            name = name.replace(expert[0], f"experts.{int(expert[1]) % 2}.")
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind in ("o_proj", "down_proj"):
            tensor = tensor.chunk(TP, dim=1)[tp]
        elif kind.endswith(("_proj", "embed_tokens", "lm_head", "sink_bias")) and kind != "eh_proj":
            tensor = tensor.chunk(TP)[tp]
        state[name] = tensor
    for name in [name for name in state if name.endswith("q_proj.weight")]:
        parts = [state.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    state = quantized(state, dtype)
    named = {}
    for name, tensor in state.items():
        name = name.replace("model.embed_tokens.", "embedding.").replace("lm_head.", "output_layer.")
        named[re.sub(r"^model\.", "decoder.", name)] = tensor
    return named


def quantized(state, dtype):
    result = {}
    for name, tensor in state.items():
        result[name] = tensor
        if dtype == "mxfp4" and ".experts." in name:
            result[name], result[name + "_scale"] = quantize_mxfp4(tensor)
        elif dtype != "bf16" and re.search(r"(qkv|gate|up|down)_proj\.weight$", name):
            result[name], result[name + "_scale_inv"] = quantize_blocks(tensor)
    return result


def write_ranks(folder, original, states, suffix=".pt"):
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(original / name, folder)
    for (tp, ep, pp), state in states.items():
        path = folder / f"rank_tp{tp}_ep{ep}_pp{pp}{suffix}"
        if suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        else:
            rest = {"optimizer": {"state": {0: torch.zeros(3)}, "groups": [{"lr": 0.1}]}, "iteration": 7}
            torch.save({"model": state, **rest}, path)
    return folder


def layout_of(tmp_path, **changes):
    values = copy.deepcopy(LAYOUT) | changes
    path = tmp_path / "layout.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


def open_ranks(folder, tmp_path, **changes):
    return RankSource(folder, read_rank_layout(layout_of(tmp_path, **changes)))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """dtype -> (folder in the released format, the states of all ranks)."""
    root, result = tmp_path_factory.mktemp("originals"), {}
    ranks = list(itertools.product(range(TP), range(EP), range(len(STAGES))))
    for dtype in ("fp8", "bf16", "mxfp4"):
        folder = write_random_checkpoint(root / dtype, dtype=dtype, overrides=SIZES, with_tokenizer=False)
        tensors = released_tensors_random(json.loads((folder / "config.json").read_text()), layout="split")
        result[dtype] = folder, {rank: local_tensors(tensors, dtype, rank) for rank in ranks}
    return result


@pytest.fixture(scope="module")
def pt_folder(originals, tmp_path_factory):
    """FP8 ranks in .pt files; read only."""
    return write_ranks(tmp_path_factory.mktemp("ranks") / "fp8", *originals["fp8"])


@pytest.fixture
def ranks(pt_folder, tmp_path):
    """A copy of them to damage."""
    return shutil.copytree(pt_folder, tmp_path / "ranks")


def edit(path, change):
    """Applies `change` to the unpickled contents of a .pt file and writes it again."""
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)


def stored_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # a column counts as contiguous whatever its last stride, and cannot be viewed as bytes then
    one, other = (torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for tensor in (one, other))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_equal(source, original):
    expected = stored_tensors(original)
    assert source.tensors.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not same_bits(source.read(name), tensor)] == []


# ---- the whole way


@pytest.mark.parametrize(
    ("dtype", "suffix"), [("fp8", ".pt"), ("fp8", ".bin"), ("fp8", ".safetensors"), ("bf16", ".pt"), ("mxfp4", ".pt")]
)
def test_ranks_read_as_the_release_bit_for_bit(originals, tmp_path, dtype, suffix):
    original, states = originals[dtype]
    folder = write_ranks(tmp_path / "ranks", original, states, suffix)
    source = open_ranks(folder, tmp_path, files=["rank_tp{tp}_ep{ep}_pp{pp}" + suffix])
    assert_equal(source, original)
    headers = Checkpoint.from_folder(original).tensors
    assert {name: info[:3] for name, info in source.tensors.items()} == {
        name: info[:3] for name, info in headers.items()
    }
    assert source.config == json.loads((original / "config.json").read_text())
    if dtype != "mxfp4":
        check_tensors(MiMoV2Config.from_dict(dict(source.config)), source.tensors)


@pytest.mark.parametrize("name", [QKV, f"{QKV}_scale_inv", EXPERT, NORM, "lm_head.weight"])
def test_rows_are_the_rows_of_the_whole(pt_folder, tmp_path, name):
    source = open_ranks(pt_folder, tmp_path)
    whole = source.read(name)
    rows = whole.shape[0]
    for start, stop in [(0, rows), (0, 0), (1, 2), (rows // 2 - 1, rows // 2 + 1), (rows // 2, rows), (rows, rows)]:
        assert same_bits(source.read_rows(name, start, stop), whole[start:stop])
    for start, stop in [(-1, 1), (2, 1), (0, rows + 1)]:
        with pytest.raises(ValueError, match=f"{re.escape(name)}: expected rows within 0 and {rows}"):
            source.read_rows(name, start, stop)


def examples():
    texts = re.findall(r"^    \{.*?^    \}$|^    \{.*\}$", rank_layout.__doc__, re.MULTILINE | re.DOTALL)
    return [json.loads(text) for text in texts]


def test_the_documented_examples_are_layouts(tmp_path):
    assert len(examples()) == 2
    for example in examples():
        (tmp_path / "layout.json").write_text(json.dumps(example))
        assert read_rank_layout(tmp_path / "layout.json").ranks == example["ranks"]


@pytest.mark.parametrize("kind", ["fp8_omni", "bf16_fused", "fp8_split"])
def test_released_files_are_one_layout(checkpoints, tmp_path, kind):
    released = examples()[1]
    folder = checkpoints[kind]
    released["ranks"]["ep"] = len({path.name[:13] for path in folder.glob("model_pp0_ep*")})
    assert released["ranks"]["ep"] > 1
    (tmp_path / "layout.json").write_text(json.dumps(released))
    source = open_source(folder, rank_layout=tmp_path / "layout.json")
    assert source.tensors == Checkpoint.from_folder(folder).tensors
    assert_equal(source, folder)


def test_converted_ranks_are_the_converted_release(originals, pt_folder, tmp_path):
    from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert

    layout = layout_of(tmp_path)
    convert(originals["fp8"][0], tmp_path / "a", to="hub", progress=False)
    convert(pt_folder, tmp_path / "b", to="hub", rank_layout=layout, progress=False)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == files
    for name in files:
        if name != "README.md":
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# ---- files of ranks


def test_missing_ranks_are_named(ranks, tmp_path):
    for name in ("rank_tp1_ep0_pp1.pt", "rank_tp0_ep1_pp0.pt"):
        (ranks / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"got none for: rank_tp0_ep1_pp0\.pt, rank_tp1_ep0_pp1\.pt"):
        open_ranks(ranks, tmp_path)


def test_missing_shards_of_a_rank_are_named(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["fp8_fused"], tmp_path / "released")
    (folder / "model_pp0_ep1_shard0.safetensors").unlink()
    changes = {"files": examples()[1]["files"], "ranks": {"ep": 2}}
    with pytest.raises(FileNotFoundError, match=r"got none for: model_pp0_ep1_shard0\.safetensors"):
        open_ranks(folder, tmp_path, indices=None, **changes)


def test_surplus_ranks_and_other_weights_are_refused(ranks, tmp_path):
    with pytest.raises(ValueError, match=r"rank_tp0_ep0_pp1.pt: expected one file per rank of .*'pp': 1"):
        open_ranks(ranks, tmp_path, ranks={"tp": 2, "ep": 2, "pp": 1}, indices=None)
    (ranks / "optimizer_0.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a pattern in `files`, or a match in `ignore`, for optimizer_0.pt"):
        open_ranks(ranks, tmp_path)
    source = open_ranks(ranks, tmp_path, ignore=[*LAYOUT["ignore"], r"^optimizer_\d"])
    assert "optimizer_0.pt" in source.fingerprint()
    shutil.copy(ranks / "rank_tp0_ep0_pp0.pt", ranks / "rank_tp00_ep0_pp0.pt")
    with pytest.raises(ValueError, match=r"rank_tp0_ep0_pp0.pt: expected one file per rank of .*, got another"):
        open_ranks(ranks, tmp_path, ignore=["^optimizer", "^iteration"])


def test_ranks_may_lie_in_folders_with_padded_numbers(ranks, tmp_path):
    for path in sorted(ranks.glob("*.pt")):
        tp, ep, pp = re.findall(r"\d", path.name)
        (ranks / f"mp_0{tp}_00{pp}_{ep}").mkdir()
        path.rename(ranks / f"mp_0{tp}_00{pp}_{ep}" / "model.pt")
    source = open_ranks(ranks, tmp_path, files=["mp_{tp}_{pp}_{ep}/model.pt"])
    assert source.tensors[QKV].file == (ranks / "mp_00_000_0" / "model.pt").resolve()
    assert len(source.fingerprint()) == 9


def test_links_out_of_the_folder_are_refused(ranks, tmp_path):
    (ranks / "rank_tp0_ep0_pp0.pt").rename(tmp_path / "elsewhere.pt")
    (ranks / "rank_tp0_ep0_pp0.pt").symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(ValueError, match="expected a file inside"):
        open_ranks(ranks, tmp_path)


def test_config_belongs_to_the_folder(ranks, tmp_path):
    (ranks / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_ranks(ranks, tmp_path)


def test_fingerprint_changes_with_a_file(ranks, tmp_path):
    source = open_ranks(ranks, tmp_path)
    before = source.fingerprint()
    assert before.keys() == {"config.json", *(path.name for path in ranks.glob("*.pt"))}
    assert source.fingerprint() == before
    os.utime(ranks / "rank_tp1_ep1_pp1.pt", ns=(1, 1))
    assert {name for name, stat in source.fingerprint().items() if stat != before[name]} == {"rank_tp1_ep1_pp1.pt"}


# ---- tensors of ranks


def test_different_copies_are_named_when_read(ranks, tmp_path):
    def change(contents):
        contents["model"]["decoder.layers.1.input_layernorm.weight"][-1] += 1

    edit(ranks / "rank_tp1_ep0_pp1.pt", change)
    source = open_ranks(ranks, tmp_path)
    pair = r"rank_tp0_ep0_pp1.pt and rank_tp1_ep0_pp1.pt, got different ones in rows 0 to 256\.$"
    with pytest.raises(ValueError, match=rf"^{re.escape(NORM)}: expected the same values in {pair}"):
        source.read(NORM)
    assert source.read_rows(NORM, 0, 255).shape == (255,)
    first = [{"names": r"input_layernorm", "join": "first"}, *LAYOUT["rules"]]
    source = open_ranks(ranks, tmp_path, rules=first)
    assert same_bits(
        source.read(NORM),
        torch.load(ranks / "rank_tp0_ep0_pp1.pt")["model"]["decoder.layers.1.input_layernorm.weight"],
    )


def test_copies_of_cut_tensors_on_expert_ranks_are_compared(ranks, tmp_path):
    def change(contents):
        contents["model"]["output_layer.weight"][5, 0] += 1

    edit(ranks / "rank_tp1_ep1_pp1.pt", change)
    with pytest.raises(ValueError, match=r"rank_tp1_ep0_pp1.pt and rank_tp1_ep1_pp1.pt"):
        open_ranks(ranks, tmp_path).read("lm_head.weight")


def test_the_first_matching_rule_decides(pt_folder, tmp_path):
    rules = [{"names": "lm_head", "join": "columns"}, *LAYOUT["rules"]]
    assert open_ranks(pt_folder, tmp_path, rules=rules).tensors["lm_head.weight"].shape == (1088, 512)
    assert open_ranks(pt_folder, tmp_path).tensors["lm_head.weight"].shape == (2176, 256)


def test_experts_may_lie_on_one_tensor_parallel_rank_each(originals, tmp_path):
    original, states = originals["bf16"]
    tensors = stored_tensors(original)
    owned = {}
    for (tp, ep, pp), state in states.items():
        if ep == 0:
            owned[tp, 0, pp] = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for name, tensor in tensors.items():
        if ".experts." in name:
            layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
            pp = int(layer >= STAGES[0])
            local = name.replace(f".layers.{layer}.", f".layers.{layer - STAGES[0] * pp}.")
            owned[expert // 2, 0, pp][local.replace("model.", "decoder.", 1)] = tensor
    folder = write_ranks(tmp_path / "ranks", original, owned)
    changes = {
        "files": ["rank_tp{tp}_ep0_pp{pp}.pt"],
        "ranks": {"tp": 2, "pp": 2},
        "indices": LAYOUT["indices"][:1],
        "rules": [{"names": r"\.experts\.", "join": "one"}, *LAYOUT["rules"]],
    }
    assert_equal(open_ranks(folder, tmp_path, **changes), original)
    changes["rules"] = [{"names": "norm", "join": "one"}, *changes["rules"]]
    with pytest.raises(ValueError, match=r"model.norm.weight: expected it on one TP rank, got it on 2"):
        open_ranks(folder, tmp_path, **changes)


# an edit of rank tp1 ep1 pp1, or another layout, and the error


def drop(name):
    return lambda contents: contents["model"].pop(name)


def put(name, tensor):
    return lambda contents: contents["model"].update({name: tensor})


MISFITS = {
    "name on some": (
        drop("decoder.layers.1.input_layernorm.weight"),
        {},
        f"{NORM}: expected it on all ranks, got none in rank_tp1_ep1_pp1.pt",
    ),
    "expert on some": (
        drop("decoder.layers.1.mlp.experts.1.up_proj.weight"),
        {},
        r"model.layers.3.mlp.experts.3.up_proj.weight: expected it on all ranks, got none in rank_tp1_ep1_pp1.pt",
    ),
    "dtype": (
        put("decoder.norm.weight", torch.zeros(256)),
        {},
        r"model.norm.weight: expected BF16 .256. .*got F32",
    ),
    "copy shape": (
        put("output_layer.weight", torch.zeros(8, 256, dtype=torch.bfloat16)),
        {},
        r"lm_head.weight: expected BF16 .1088, 256. in rank_tp1_ep1_pp1.pt as in .*got BF16 .8, 256.",
    ),
    "column vector": (
        None,
        {"rules": [{"names": "", "join": "columns"}]},
        "attention_sink_bias: expected two dimensions to join columns, got .4.",
    ),
    "no rule": (None, {"rules": LAYOUT["rules"][:2]}, "lm_head.weight: expected a rule that says how"),
    "two names in one": (
        None,
        {"rename": [*LAYOUT["rename"], ["post_attention_layernorm", "input_layernorm"]]},
        "expected one tensor of that name per rank, got it from .*rank_tp0_ep0_pp0.pt",
    ),
    "index too large": (
        put("decoder.layers.3.input_layernorm.weight", torch.zeros(256)),
        {},
        r"rank_tp1_ep1_pp1.pt: model.layers.3.input_.*: expected a number below 3 .* on pp rank 1, got '3'",
    ),
    "not ignored": (
        None,
        {"ignore": [r"^optimizer\."]},
        "rank_tp0_ep0_pp0.pt: iteration: expected a tensor, or a match in `ignore`, got int",
    ),
    "optimizer": (None, {"ignore": ["^iteration"]}, "optimizer.groups: expected a tensor, .* got list"),
    "step tensor": (
        put("step", torch.tensor(3)),
        {},
        "model.step: expected a tensor, .* tensor without dimensions",
    ),
    "dtype nobody has": (
        put("mask", torch.zeros(2, dtype=torch.complex64)),
        {},
        "model.mask: expected a tensor, .* got tensor of torch.strided torch.complex64",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_together_is_refused(ranks, tmp_path, case):
    change, layout, message = MISFITS[case]
    if change is not None:
        edit(ranks / "rank_tp1_ep1_pp1.pt", change)
    with pytest.raises(ValueError, match=message) as caught:
        open_ranks(ranks, tmp_path, **layout)
    assert "\n" not in str(caught.value)


def small_ranks(tmp_path, states, **config):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_key_value_heads": 2} | config))
    for tp, state in enumerate(states):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / f"{tp}.safetensors")
    values = {"files": ["{tp}.safetensors"], "ranks": {"tp": len(states)}, "rules": [{"names": "", "join": "rows"}]}
    (tmp_path / "layout.json").write_text(json.dumps(values))
    return open_source(folder, rank_layout=tmp_path / "layout.json")


def test_parts_have_the_same_columns(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected F32 \[8, 4\] in 1.safetensors as in 0.safetensors, got F32 \[8, 5\]"
    ):
        small_ranks(tmp_path, [{"lm_head.weight": torch.zeros(8, 4)}, {"lm_head.weight": torch.zeros(8, 5)}])


def test_parts_may_differ_in_rows(tmp_path):
    parts = torch.randn(13, 4).split((8, 5))
    source = small_ranks(tmp_path, [{"lm_head.weight": part} for part in parts])
    assert same_bits(source.read("lm_head.weight"), torch.cat(parts))


def test_one_expert_rank_has_a_tensor_or_all(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for ep in range(3):
        names = ["all", f"own{ep}"] + ["some"] * (ep < 2)
        save_file({name: torch.ones(2) for name in names}, tmp_path / f"{ep}.safetensors")
    (tmp_path / "layout.json").write_text(json.dumps({"files": ["{ep}.safetensors"], "ranks": {"ep": 3}}))
    with pytest.raises(ValueError, match=r"^some: expected it on all ranks, got none in 2.safetensors$"):
        open_source(tmp_path, rank_layout=tmp_path / "layout.json")


def test_numbers_of_uneven_stages_add_up(tmp_path):
    indices = [{"names": r"layers\.(\d+)\.", "rank": "pp", "per_rank": [3, 1, 4]}]
    ranks = {"tp": 1, "ep": 1, "pp": 3}
    layout = read_rank_layout(layout_of(tmp_path, ranks=ranks, indices=indices, rename=None))
    assert [layout.released_name("layers.0.a", {"pp": pp}) for pp in range(3)] == [f"layers.{n}.a" for n in (0, 3, 4)]
    assert layout.released_name("layers.7.a", {"tp": 0}) == "layers.7.a"


def test_fused_rows_need_a_rank_per_chunk(tmp_path):
    with pytest.raises(ValueError, match=r"expected one TP rank per chunk .* num_key_value_heads = 2, got 3"):
        small_ranks(tmp_path, [{QKV: torch.zeros(8, 4)}] * 3)


def test_fused_rows_of_ranks_are_not_plain(tmp_path):
    with pytest.raises(ValueError, match="expected one TP rank per chunk"):
        small_ranks(tmp_path, [{QKV: torch.zeros(8, 4)}] * 2, fused_qkv_layout="plain")


def test_a_cut_vision_projection_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected the vision tower's \[Q . K . V\] uncut, got it cut over 2"):
        small_ranks(tmp_path, [{"visual.blocks.0.attn.qkv.weight": torch.zeros(8, 4)}] * 2)


@pytest.mark.parametrize(("rows", "fits"), [((128, 128), True), ((128, 72), True), ((120, 128), False)])
def test_scale_blocks_end_where_a_part_ends(tmp_path, rows, fits):
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [torch.randn(count, 200) for count in rows]
    states = [dict(zip((name, f"{name}_scale_inv"), quantize_blocks(weight))) for weight in weights]
    if fits:
        source, whole = small_ranks(tmp_path, states), quantize_blocks(torch.cat(weights))
        assert same_bits(source.read(name), whole[0])
        assert same_bits(source.read(f"{name}_scale_inv"), whole[1])
    else:
        with pytest.raises(ValueError, match=r"expected blocks that end where a rank's part ends, got .*120, 200"):
            small_ranks(tmp_path, states)


def test_every_part_has_its_whole_scale_grid(tmp_path):
    codes, scale = quantize_blocks(torch.randn(130, 128))
    state = {QKV: codes, f"{QKV}_scale_inv": scale[:1]}
    with pytest.raises(ValueError, match=r"got a part of \[130, 128\] with scales \[1, 1\] in 0.safetensors"):
        small_ranks(tmp_path, [state, state])


# ---- files of torch.save


def test_views_read_as_their_values(tmp_path):
    base = torch.arange(60.0).reshape(6, 10)
    tensors = {
        "base": base,
        "columns": base[:, 3:7],
        "transposed": base.t(),
        "steps": base[::2, 1::3],
        "column": base[3:4].t(),
        "element": base[2:3, 4:5].t(),
        "expanded": torch.ones(1, 4).expand(3, 4),
        "parameter": torch.nn.Parameter(base[2:]),
        "empty": torch.zeros(0, 3),
        "float8": torch.randn(5, 7).to(torch.float8_e4m3fn).t(),
    }
    torch.save(tensors, tmp_path / "a.pt")
    stored, others = read_torch_header(tmp_path / "a.pt")
    assert others == {}
    for name, tensor in tensors.items():
        rows = tensor.shape[0]
        assert same_bits(read_stored_rows(stored[name], 0, rows), tensor.detach())
        assert same_bits(read_stored_rows(stored[name], rows // 2, rows), tensor.detach()[rows // 2 :])


def bytes_read():
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_opening_reads_no_tensor_data_and_rows_only_theirs(tmp_path, suffix):
    state = {"big.weight": torch.zeros(4096, 1024), "other.weight": torch.zeros(4096, 1024)}
    (tmp_path / "config.json").write_text("{}")
    torch.save(state, tmp_path / "0.pt") if suffix == ".pt" else save_file(state, tmp_path / "0.safetensors")
    (tmp_path / "layout.json").write_text(json.dumps({"files": ["{pp}" + suffix], "ranks": {"pp": 1}}))
    start = bytes_read()
    source = open_source(tmp_path, rank_layout=tmp_path / "layout.json")
    opened = bytes_read()
    source.read_rows("big.weight", 100, 612)
    assert opened - start < 2**17
    assert 2**21 <= bytes_read() - opened < 2**21 + 2**17


class Calls:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def rewritten(path, **records):
    """A file of torch.save with other contents of some records, by the last part of their names."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            key = name.rpartition("/")[2].removeprefix(".")
            archive.writestr(name.upper() if key in records else name, records.get(key, data))


def test_a_pickle_that_calls_anything_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value, named in ((Calls(), "posix.mkdir"), (argparse.Namespace(), "argparse.Namespace")):
        torch.save({"a.weight": torch.zeros(2), "extra": value}, "bad.pt")
        with pytest.raises(ValueError, match=rf"^bad.pt: expected a pickle of tensors .* calls {named}: refused") as e:
            read_torch_header("bad.pt")
        assert "\n" not in str(e.value)
    assert not Path("executed").exists()


def loop():
    value = {}
    value["inside"] = value
    return value


def tower():
    value = {}
    for _ in range(60):
        value = {"left": value, "right": value}
    return value


DAMAGES = {
    "old format": (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "torch 1.6.*re-save it"),
    "empty": (lambda path: path.write_bytes(b""), "got a file that begins b''"),
    "git lfs": (lambda path: path.write_bytes(b"version https"), "got a file that begins b'vers'"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "got a damaged one"),
    # both crash torch.load on the meta device
    "big endian": (lambda path: rewritten(path, byteorder=b"big"), "byteorder: expected b'little', got b'big'"),
    "alignment": (lambda path: rewritten(path, storage_alignment=b"0"), "alignment: expected a positive number"),
    "long alignment": (lambda path: rewritten(path, storage_alignment=b"1" * 99), "expected at most 20 bytes, got 99"),
    "list": (lambda path: torch.save([torch.zeros(2)], path), "expected a dict of tensors, got list"),
    "loop": (lambda path: torch.save(loop(), path), "expected every dict once, got 'inside' again"),
    "tower": (lambda path: torch.save(tower(), path), "expected every dict once, got"),
    "one name twice": (lambda path: torch.save({1: torch.zeros(2), "1": 2}, path), "every name once, got '1' twice"),
    "no pickle": (lambda path: rewritten(path, **{"data.pkl": b"nothing"}), "expected a (file|pickle) of "),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_refused_in_one_line(tmp_path, case):
    path = tmp_path / "a.pt"
    torch.save({"a.weight": torch.zeros(8, 4)}, path)
    damage, message = DAMAGES[case]
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        read_torch_header(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_storage_larger_than_its_record_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a.weight": torch.zeros(8, 4), "b.weight": torch.zeros(8, 4)}, path)
    data = path.read_bytes()
    # the pickled number of elements of each storage, 32, and both sizes
    assert data.count(b"K ") >= 2
    path.write_bytes(data.replace(b"K tq", b"K@tq", 1))
    with pytest.raises(ValueError, match=r"tensor 'a.weight': expected a record with its 128 bytes, got none"):
        read_torch_header(path)


def test_a_file_that_became_shorter_is_noticed(tmp_path):
    torch.save({"a.weight": torch.zeros(800, 4)}, tmp_path / "a.pt")
    stored, _ = read_torch_header(tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", 2000)
    with pytest.raises(ValueError, match=r"a.pt: expected 12800 bytes at \d+, got \d+"):
        read_stored_rows(stored["a.weight"], 0, 800)


# ---- layouts

WRONG_LAYOUTS = {
    "unknown key": ({"key": "model"}, "the layout: expected keys out of files, ranks, .*, got 'key'"),
    "no files": ({"files": None}, "the layout: expected the key 'files', got none"),
    "files empty": ({"files": [], "ranks": {}}, "`files`: expected a pattern, got none"),
    "files type": ({"files": "a{tp}.pt"}, "`files`: expected a list, got 'a{tp}.pt'"),
    "suffix": ({"files": ["{tp}.npz"]}, r"`files\[0\]`: expected a name ending in .safetensors, .*got '{tp}.npz'"),
    "absolute": ({"files": ["/etc/{tp}.pt"]}, r"`files\[0\]`: expected a path inside the folder"),
    "parent": ({"files": ["../{tp}.pt"]}, r"`files\[0\]`: expected a path inside the folder"),
    "field": ({"files": ["{dp}.pt"]}, r"`files\[0\]`: expected each of {tp}, {ep}, {pp}, {shard} at most once"),
    "field twice": ({"files": ["{tp}{tp}.pt"]}, r"`files\[0\]`: expected each of {tp}"),
    "attribute": ({"files": ["{tp.real}.pt"]}, r"`files\[0\]`: expected each of {tp}"),
    "unused rank": ({"files": ["{tp}{pp}.pt"]}, "`files`: expected a pattern with {ep}, got none"),
    "axis": ({"ranks": {"dp": 2}}, "`ranks`: expected keys out of tp, ep, pp, got 'dp'"),
    "rank type": ({"ranks": {"tp": True}}, "`ranks.tp`: expected a positive int, got True"),
    "rank zero": ({"ranks": {"tp": 0}}, "`ranks.tp`: expected a positive int, got 0"),
    "too many": ({"ranks": {"tp": 10**9}}, "`ranks`: expected at most 65536 in all, got 1000000000"),
    "ignore": ({"ignore": ["a", "("]}, r"`ignore\[1\]`: expected a regular expression, got '\(' \(missing"),
    "ignore type": ({"ignore": [3]}, r"`ignore\[0\]`: expected a regular expression, got 3"),
    "rename": ({"rename": [["a"]]}, r"`rename\[0\]`: expected a pair of a pattern and its replacement, got \['a'\]"),
    "replacement": (
        {"rename": [["a", r"\2"]]},
        r"`rename\[0\]`: expected a replacement that fits",
    ),
    "groups": (
        {"indices": [{"names": "a", "rank": "tp", "per_rank": 1}]},
        r"`indices\[0\].names`: expected one group around the number, got 0",
    ),
    "index rank": (
        {"indices": [{"names": "(a)", "rank": "dp", "per_rank": 1}]},
        r"`indices\[0\].rank`: expected one of tp, ep, pp, got 'dp'",
    ),
    "per_rank": (
        {"indices": [{"names": "(a)", "rank": "pp", "per_rank": [1, 2, 3]}]},
        r"`indices\[0\].per_rank`: expected an int or 2 of them, got \[1, 2, 3\]",
    ),
    "index key": ({"indices": [{"names": "(a)", "rank": "pp"}]}, r"`indices\[0\]`: expected the key 'per_rank'"),
    "join": (
        {"rules": [{"names": "", "join": "sum"}]},
        r"`rules\[0\].join`: expected one of rows, columns, same",
    ),
    "rule key": (
        {"rules": [{"names": "", "tp": "rows"}]},
        r"`rules\[0\]`: expected keys out of names, join, got",
    ),
    "rule type": ({"rules": ["rows"]}, r"`rules\[0\]`: expected an object, got 'rows'"),
}


@pytest.mark.parametrize("case", WRONG_LAYOUTS)
def test_wrong_layouts_name_the_key(tmp_path, case):
    changes, message = WRONG_LAYOUTS[case]
    path = layout_of(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_rank_layout(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"[1]", b"{", b"\xff", b'{"files": [], "files": []}', b"[" * 100_000, b" " * (2**20 + 1)]
)
def test_layouts_that_are_no_json_object_are_refused(tmp_path, text):
    (tmp_path / "layout.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"layout.json: .*expected (a JSON object|an object|at most 1048576 bytes)"):
        read_rank_layout(tmp_path / "layout.json")


def test_a_missing_layout_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.json: expected a rank layout in JSON"):
        read_rank_layout(tmp_path / "none.json")
