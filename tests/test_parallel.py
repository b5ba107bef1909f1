"""Tensor, expert and FSDP2 parallelism with 2 and 4 processes, against one process; which degrees are refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from patience import PATIENCE
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.distributed import DistributedConfig

from modeling_mimo import MiMoV2Config, MiMoV2FP8Config
from modeling_mimo.checkpoint_mimo_v2 import Checkpoint
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.lazy_weights_mimo_v2 import LazyWeight
from modeling_mimo.parallel_mimo_v2 import attention_degrees
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors


HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "parallel" / "generate.py"

# two global and two sliding layers; four chunks, as V2.5, of 68 and 88 rows; widths of which a quarter is whole blocks
LAYERS = {"num_hidden_layers": 4, "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1]}
FOUR_CHUNKS = {
    **LAYERS,
    "num_key_value_heads": 4,
    "swa_num_key_value_heads": 8,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
}
CHECKPOINTS = {
    "omni": {"dtype": "fp8", "vision": True, "audio": True, "overrides": FOUR_CHUNKS},
    "bf16": {"dtype": "bf16", "overrides": FOUR_CHUNKS},
    "mxfp4": {"dtype": "mxfp4", "overrides": FOUR_CHUNKS},
    "split": {"dtype": "fp8", "layout": "split", "overrides": FOUR_CHUNKS},
    "plain": {"dtype": "fp8", "layout": "plain", "overrides": FOUR_CHUNKS},
    # two chunks, and halves of 192 and 64 rows
    "narrow": {"dtype": "fp8", "overrides": LAYERS},
}

# float32 sums over ranks in another order; logits are up to 5
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parallel")
    return {
        name: write_random_checkpoint(root / name, "tiny", with_tokenizer=False, **arguments)
        for name, arguments in CHECKPOINTS.items()
    }


def run(command: list) -> str:
    """What `command` prints; it and the processes it started are killed after PATIENCE."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, errors[-4000:]
    return output


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory):
    """(ranks, scenario) -> what each rank of parallel_worker.py found."""
    output = tmp_path_factory.mktemp("found")
    (output / "checkpoints.json").write_text(json.dumps({name: str(folder) for name, folder in folders.items()}))
    run([sys.executable, HERE / "parallel_worker.py", output / "checkpoints.json", output])
    results = {}
    for size in (2, 4):
        ranks = [json.loads((output / f"{size}.{rank}.json").read_text()) for rank in range(size)]
        results.update({(size, name): [rank[name] for rank in ranks] for name in ranks[0]})
    return results


# what a rank holds of 8 query and 8 KV heads (4 in "narrow") of a sliding layer, and of 8 experts
SHARES = {
    (2, "dequantized"): ([4, 4], [8, 512, 256]),
    (2, "dequantized_experts"): ([4, 4], [4, 1024, 256]),
    (2, "resident"): ([4, 4], [8, 512, 256]),
    (2, "resident_experts"): ([4, 4], [4, 1024, 256]),
    (2, "bf16"): ([4, 4], [8, 512, 256]),
    # two values per byte
    (2, "mxfp4"): ([4, 4], [8, 512, 128]),
    (2, "mxfp4_dequantized_experts"): ([4, 4], [4, 1024, 256]),
    (2, "split"): ([4, 4], [8, 512, 256]),
    (2, "uneven"): ([4, 2], [8, 128, 256]),
    (4, "dequantized"): ([2, 2], [8, 256, 256]),
    (4, "resident_experts"): ([2, 2], [2, 1024, 256]),
    (4, "replicated_attention"): ([8, 4], [2, 256, 256]),
}


@pytest.mark.parametrize("scenario", SHARES, ids=lambda scenario: f"{scenario[1]}-{scenario[0]}")
def test_a_parallel_model_is_the_plain_one(found, scenario):
    heads, experts = SHARES[scenario]
    for rank in found[scenario]:
        assert isinstance(rank, dict), rank
        assert rank["wrong"] == []
        assert rank["difference"] <= TOLERANCE
        assert rank["tokens"]
        assert rank["drafted"]
        # of a sliding layer and of an MTP head
        assert rank["heads"] == [heads, heads]
        assert rank["experts"] == experts
        # trunk and heads are shared out, towers and norms are not
        assert rank["plain_bytes"] / scenario[0] < rank["bytes"] < 0.7 * rank["plain_bytes"]


def test_layers_whose_shares_cut_scale_blocks_are_dequantized_alone(found):
    for rank in found[2, "uneven_resident"]:
        assert rank["difference"] <= TOLERANCE
        assert rank["equal"]
        # one dense layer and three heads have three such projections each
        assert rank["fp8"] == rank["plain_fp8"] - 4 * 3


def test_all_ranks_save_what_one_process_saves(found):
    for rank in found[2, "save"]:
        assert rank["equal"]
        assert rank["tensors"] > 200


def test_a_cache_holds_local_heads_and_goes_on_where_it_was_saved(found):
    for rank in found[2, "cache"]:
        assert rank["heads"] == 2
        assert rank["difference"] <= TOLERANCE
        assert "kv_heads" in rank["refused"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_of_fsdp_is_the_step_of_one_process(found, ranks):
    """With media and the loss of the MTP heads; 4 ranks: two rows of data, each on two ranks of tensor parallelism."""
    for rank in found[ranks, "training"]:
        assert isinstance(rank, dict), rank
        assert rank["loss"] <= TOLERANCE
        assert rank["worst"][1] <= 1e-6
        assert rank["still"] == []
        assert rank["largest_step"] > 0.1


REFUSED = {
    (2, "refused_plain"): ("`fused_qkv_layout`", "--layout split"),
    (2, "refused_uneven_experts"): ("moe_intermediate_size=128", "ep_size=2"),
    (2, "refused_device_map"): ("`device_map`", "without distributed_config"),
    (2, "refused_stages"): ("`pp_size`", "tp_size and ep_size"),
    (2, "refused_fp8_training"): ("`dequantize`", "dequantize=True"),
    (4, "refused_chunks"): ("`tp_size`: expected one of [1, 2]", "ep_size=4"),
}


@pytest.mark.parametrize("scenario", REFUSED, ids=lambda scenario: scenario[1])
def test_combinations_that_cannot_work_name_another(found, scenario):
    for rank in found[scenario]:
        assert rank.count("\n") == 0
        assert all(part in rank for part in REFUSED[scenario])


@pytest.fixture
def pretended_ranks(monkeypatch):
    """A process group of any size in this process, whose collectives do nothing."""
    monkeypatch.setenv("LOCAL_RANK", "0")

    def start(size: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)

    yield start
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp_size": 3}, r"`tp_size`: expected one of \[1, 2, 4\], which leave every rank whole QKV chunks, got 3"),
        ({"tp_size": 8}, r"`tp_size`: expected one of \[1, 2, 4\], .* got 8; .*replicated_attention"),
        ({"tp_size": 1, "fsdp_size": 3, "ep_size": 3}, r"`ep_size`: expected one of \[1, 2, 4, 8\], .* got 3"),
    ],
)
def test_degrees_are_refused_before_a_weight_is_read(folders, pretended_ranks, monkeypatch, degrees, message):
    def read(*args, **kwargs):
        raise RuntimeError("a weight was read")

    monkeypatch.setattr(Checkpoint, "slices", read)
    pretended_ranks(degrees["tp_size"] * degrees.get("fsdp_size", 1))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folders["omni"], distributed_config=DistributedConfig(**degrees))


def test_bitsandbytes_beside_parallelism_names_what_can_be_shared_out(folders, pretended_ranks):
    quantization, degrees = BitsAndBytesConfig(load_in_4bit=True), DistributedConfig(tp_size=2)
    pretended_ranks(2)
    with pytest.raises(ValueError, match=r"FP8.*device_map"):
        AutoModelForCausalLM.from_pretrained(
            folders["bf16"], quantization_config=quantization, distributed_config=degrees
        )


def test_attention_degrees_are_those_of_the_chunks_or_of_the_heads():
    assert attention_degrees(MiMoV2Config()) == [1, 2, 4]
    assert attention_degrees(MiMoV2Config(num_key_value_heads=8, swa_num_key_value_heads=8)) == [1, 2, 4, 8]
    split = {"attention_projection_layout": "split", "num_key_value_heads": 8, "swa_num_key_value_heads": 4}
    assert attention_degrees(MiMoV2Config(**split)) == [1, 2, 4]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        # chunks of 136 rows, of which the second block has 8
        ("narrow", "model.layers.0.self_attn.qkv_proj.weight"),
        ("narrow", "model.layers.0.mlp.down_proj.weight"),
        ("mxfp4", "model.layers.1.mlp.experts.3.down_proj.weight"),
    ],
)
def test_any_rectangle_of_a_lazy_weight_is_that_of_the_whole_one(folders, folder, name):
    config = MiMoV2Config.from_pretrained(folders[folder])
    slices = Checkpoint.from_folder(folders[folder]).slices()
    scale = slices.get(f"{name}_scale_inv") or slices[f"{name}_scale"]
    weight = LazyWeight(slices[name], scale, released_tensors(config)[name], torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folders[folder], dtype=torch.float32)
    if ".experts." in name:
        whole = model.get_parameter("model.layers.1.mlp.experts.down_proj")[3]
    else:
        whole = model.get_parameter(name)
    rows, columns = weight.get_shape()
    assert list(whole.shape) == [rows, columns]
    assert torch.equal(weight[...], whole)
    for top, bottom, left, right in ((0, rows, 64, 96), (130, 140, 0, columns), (100, rows, 33, 200), (7, 8, 5, 6)):
        assert torch.equal(weight[top:bottom, left:right], whole[top:bottom, left:right])
    assert torch.equal(weight[rows // 2 :], whole[rows // 2 :])


def test_the_example_runs_under_torchrun_and_says_what_one_process_says(tmp_path):
    folder = write_random_checkpoint(tmp_path / "checkpoint", "tiny", overrides=LAYERS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLE, folder]
    said = run([*command, "--prompt", "Hello", "--max-new-tokens", "8", "--mtp"]).strip()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    quantization = MiMoV2FP8Config(dequantize=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    output = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert said == tokenizer.decode(output, skip_special_tokens=True).strip() != ""
