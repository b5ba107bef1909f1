"""Ranks of parallel runs on gloo: `python parallel_worker.py checkpoints.json folder`.

Each rank compares parallel models with the plain one of its process and writes to `folder` what it found, per
scenario: names of parameters that are not the right share of the plain ones, differences of logits, equal tokens.
"""

import functools
import json
import multiprocessing
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from patience import PATIENCE
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_mimo import HybridCache, MiMoV2FP8Config
from modeling_mimo.parallel_mimo_v2 import replicated_attention


FOLDERS = {name: Path(folder) for name, folder in json.loads(Path(sys.argv[1]).read_text()).items()}
OUTPUT = Path(sys.argv[2])
TOKENS, LEARNING_RATE, MTP_WEIGHT = 6, 0.5, 0.3


def load(name: str, degrees: dict | None = None, resident: bool = False, folder: Path | None = None):
    options = {"quantization_config": MiMoV2FP8Config(dequantize=False)} if resident else {}
    if degrees is not None:
        options["distributed_config"] = DistributedConfig(**degrees)
    return AutoModelForCausalLM.from_pretrained(folder or FOLDERS[name], dtype=torch.float32, **options)


def token_ids(rows: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(0, 2000, (rows, length), generator=torch.Generator().manual_seed(1))


def media(config, seed: int = 0) -> dict[str, torch.Tensor]:
    """A row with text, an image of 4 x 4 patches, a video of two temporal grids and 8 frames of sound."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 2000, (4,), generator=generator).tolist()
    image, video, audio = (
        [token] * 4 for token in (config.image_token_id, config.video_token_id, config.audio_token_id)
    )
    vision = config.vision_config
    values = vision.num_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": torch.tensor([[*text, *image, 5, *video, 6, *video, 7, *audio[:2], *text]]),
        "pixel_values": torch.randn(16, values, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(32, values, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "audio_codes": torch.randint(0, 1000, (8, config.audio_config.audio_channels), generator=generator),
        "audio_code_lengths": torch.tensor([8]),
    }


def wrong_shares(model, plain) -> list[str]:
    """Parameters that are not what this rank is to hold of those of `plain`, value and dtype."""
    expected, wrong = dict(plain.named_parameters()), []
    for name, parameter in model.named_parameters():
        part = expected.pop(name).detach()
        if isinstance(parameter, DTensor):
            part = distribute_tensor(part, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
            parameter = parameter.to_local()
        if parameter.dtype != part.dtype or not torch.equal(parameter.float(), part.float()):
            wrong.append(name)
    return wrong + list(expected)


def outputs(model, with_media: bool = False) -> dict[str, torch.Tensor]:
    inputs = media(model.config) if with_media else {"input_ids": token_ids()}
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return {
            "logits": model(**inputs).logits,
            "tokens": model.generate(**inputs, **options),
            "drafted": model.generate(**inputs, **options, use_mtp=True),
        }


@functools.cache
def plain_run(name: str, resident: bool, with_media: bool):
    """The model of one process, which nobody changes, and its outputs."""
    model = load(name, resident=resident)
    return model, outputs(model, with_media)


def compare(name: str, resident: bool = False, with_media: bool = False, **degrees) -> dict:
    plain, expected = plain_run(name, resident, with_media)
    model = load(name, degrees, resident)
    got = outputs(model, with_media)
    states = torch.zeros(1, 1, model.config.hidden_size)
    heads = [
        [part.shape[1] for part in layer.self_attn.project(states)[:2]]
        for layer in (model.model.layers[1], model.model.mtp.layers[0])
    ]
    return {
        "wrong": wrong_shares(model, plain),
        "difference": (got["logits"] - expected["logits"]).abs().max().item(),
        "tokens": torch.equal(got["tokens"], expected["tokens"]),
        "drafted": torch.equal(got["drafted"], expected["drafted"]),
        "heads": heads,
        "experts": list(model.model.layers[1].mlp.experts.gate_up_proj.to_local().shape),
        "bytes": sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters()),
        "plain_bytes": sum(parameter.nbytes for parameter in plain.parameters()),
    }


def compare_fp8(name: str, degrees: dict) -> dict:
    """FP8-resident, where some layers turned out not to stay so: outputs alone."""
    plain, expected = plain_run(name, resident=True, with_media=False)
    model = load(name, degrees, resident=True)
    got = outputs(model)
    return {
        "difference": (got["logits"] - expected["logits"]).abs().max().item(),
        "equal": all(torch.equal(got[key], expected[key]) for key in ("tokens", "drafted")),
        "fp8": sum(parameter.itemsize == 1 for parameter in model.parameters()),
        "plain_fp8": sum(parameter.itemsize == 1 for parameter in plain.parameters()),
    }


def save(degrees: dict) -> dict:
    """Saved by all ranks together, the folder is what one process saves."""
    load("omni", degrees).save_pretrained(OUTPUT / "shared")
    plain = load("omni")
    if dist.get_rank() == 0:
        plain.save_pretrained(OUTPUT / "plain")
    dist.barrier()
    files = [safe_open(next((OUTPUT / name).glob("*.safetensors")), "pt") for name in ("shared", "plain")]
    names = [set(file.keys()) for file in files]
    same = all(torch.equal(*(file.get_tensor(name) for file in files)) for name in sorted(names[0] & names[1]))
    return {"equal": names[0] == names[1] and same, "tensors": len(names[0])}


def cache(degrees: dict) -> dict:
    """A cache saved by a rank goes on there, and is refused by a model with another number of heads."""
    model, ids = load("omni", degrees), token_ids(rows=1)
    path = OUTPUT / f"cache.{dist.get_rank()}.safetensors"
    with torch.no_grad():
        states = HybridCache(model.config)
        model(ids[:, :13], cache=states)
        states.save(path)
        rest = model(ids[:, 13:], cache=HybridCache.load(path, model.config)).logits
        difference = (rest - model(ids).logits[:, 13:]).abs().max().item()
    return {"difference": difference, "heads": states.layers[0].keys.shape[1], "refused": refused(use_on_one, path)}


def use_on_one(path: Path) -> None:
    plain = load("omni")
    plain(token_ids(rows=1)[:, 13:], cache=HybridCache.load(path, plain.config))


def refused(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def training_step(degrees: dict) -> dict:
    """Loss with the MTP heads' and weights after one step, ranks of different `fsdp` having a row each."""
    before = dict(plain_run("omni", resident=False, with_media=False)[0].named_parameters())
    plain, model = load("omni"), load("omni", degrees)
    rows = [media(plain.config, seed) for seed in range(2)]
    both = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    place = model._mesh_manager.get_mesh("fsdp").get_local_rank()
    losses = []
    for part, inputs in ((plain, both), (model, rows[place])):
        optimizer = torch.optim.SGD(part.parameters(), lr=LEARNING_RATE)
        output = part(**inputs, labels=inputs["input_ids"], mtp_loss_weight=MTP_WEIGHT)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.detach())
    dist.all_reduce(losses[1])
    expected = dict(plain.named_parameters())
    differences, steps = {}, {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        differences[name] = (full - expected[name]).abs().max().item()
        steps[name] = (full - before[name]).abs().max().item()
    worst = max(differences, key=differences.get)
    return {
        "loss": (losses[1] / dist.get_world_size() - losses[0]).abs().item(),
        "worst": [worst, differences[worst]],
        "still": [name for name, step in steps.items() if step == 0],
        "largest_step": max(steps.values()),
    }


# what the scenarios compare with: made once, before the ranks are forked
PLAIN = [
    ("omni", False, True),
    ("omni", False, False),
    ("omni", True, True),
    ("omni", True, False),
    ("bf16", False, False),
    ("mxfp4", True, False),
    ("mxfp4", False, False),
    ("split", False, False),
    ("narrow", False, False),
    ("narrow", True, False),
]

TENSOR, EXPERT = {"tp_size": 2}, {"tp_size": 2, "tp_plan": "auto", "ep_size": 2}

TWO = {
    "dequantized": lambda: compare("omni", with_media=True, **TENSOR),
    "dequantized_experts": lambda: compare("omni", **EXPERT),
    "resident": lambda: compare("omni", resident=True, with_media=True, **TENSOR),
    "resident_experts": lambda: compare("omni", resident=True, **EXPERT),
    "bf16": lambda: compare("bf16", **TENSOR),
    "mxfp4": lambda: compare("mxfp4", resident=True, **TENSOR),
    "mxfp4_dequantized_experts": lambda: compare("mxfp4", **EXPERT),
    "split": lambda: compare("split", **TENSOR),
    # shares of 192 and 64 rows, which cut scale blocks
    "uneven": lambda: compare("narrow", **TENSOR),
    "uneven_resident": lambda: compare_fp8("narrow", EXPERT),
    "save": lambda: save(TENSOR),
    "cache": lambda: cache(TENSOR),
    "training": lambda: training_step({"fsdp_size": 2}),
    "refused_plain": lambda: refused(load, "plain", TENSOR),
    "refused_uneven_experts": lambda: refused(load, "narrow", TENSOR, resident=True),
    "refused_device_map": lambda: refused(
        AutoModelForCausalLM.from_pretrained,
        FOLDERS["omni"],
        device_map="auto",
        distributed_config=DistributedConfig(**TENSOR),
    ),
    "refused_stages": lambda: refused(load, "omni", {"pp_size": 2}),
    "refused_fp8_training": lambda: refused(load, "omni", {"fsdp_size": 2}, resident=True),
}

FOUR = {
    "dequantized": lambda: compare("omni", with_media=True, tp_size=4),
    "resident_experts": lambda: compare("omni", resident=True, tp_size=4, tp_plan="auto", ep_size=4),
    "refused_chunks": lambda: refused(load, "narrow", {"tp_size": 4}),
    # two chunks, so attention cannot be shared out to four
    "replicated_attention": lambda: compare(
        "narrow", tp_size=4, ep_size=4, tp_plan=replicated_attention(AutoConfig.from_pretrained(FOLDERS["narrow"]))
    ),
    "training": lambda: training_step({"fsdp_size": 2, "tp_size": 2}),
}


def run_rank(rank: int, size: int) -> None:
    store = dist.FileStore(str(OUTPUT / f"store.{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
    results = {}
    for name, scenario in {2: TWO, 4: FOUR}[size].items():
        try:
            results[name] = scenario()
        except Exception:
            results[name] = traceback.format_exc()
    (OUTPUT / f"{size}.{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Both sizes, each in processes that are forked from this one: the libraries take as long to import as all of it.

    `torchrun` itself starts examples/parallel/generate.py in a test of its own.
    """
    torch.set_num_threads(1)
    for name, resident, with_media in PLAIN:
        plain_run(name, resident, with_media)
    context = multiprocessing.get_context("fork")
    for size in (2, 4):
        ranks = [context.Process(target=run_rank, args=(rank, size)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
