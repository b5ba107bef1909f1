"""Peak memory of one training step: adapters on bf16, FP8 and 4-bit weights, and full fine-tuning.

    python benchmarks/lora_memory.py

Every case runs in a fresh process: it loads the checkpoint, makes two steps with AdamW under gradient checkpointing,
and measures the second one. Ratios are to the bytes of all weights in bf16. "PEFT's experts" are `target_parameters`
of plain PEFT, which add up the weights of all experts in every forward.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from common import (
    Bar,
    bench_checkpoint,
    child_task,
    finish,
    parse,
    parser,
    progress,
    random_tokens,
    reset_peak,
    resident_bytes,
    run_child,
    settled_bytes,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.training import apply_stage, lora_config, lora_targets


TOKENS = 512
RANK = 8
# name -> storage of the weights, parts with adapters (none: full fine-tuning)
CASES = {
    "full fine-tuning": ("bf16", ()),
    "LoRA: attention": ("bf16", ("attention",)),
    "LoRA: attention, experts": ("bf16", ("attention", "experts")),
    "LoRA: attention, PEFT's experts": ("bf16", ("attention", "experts")),
    "LoRA on FP8: attention, experts": ("fp8", ("attention", "experts")),
    "QLoRA, nf4: attention, experts": ("nf4", ("attention", "experts")),
}


def load(folder: str, storage: str):
    settings = MiMoV2FP8Config(dequantize=storage == "bf16")
    if storage == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings)


def trainable(model, case: str, parts: tuple[str, ...]):
    """`model` with what the case trains."""
    model.activation_checkpointing_enable()
    if not parts:
        apply_stage(model, "sft")
        return model
    model.enable_input_require_grads()
    if "PEFT" in case:
        return get_peft_model(model, LoraConfig(r=RANK, **lora_targets(model, parts)))
    return get_peft_model(model, lora_config(model, parts, r=RANK))


def child(task: dict) -> dict:
    """Bytes of weights as stored, how many numbers learn, bytes of memory at rest and at the peak of a step, and the
    loss before the first step.
    """
    storage, parts = CASES[task["case"]]
    before = settled_bytes()
    model = load(task["model"], storage)
    stored = model.get_memory_footprint()
    model = trainable(model, task["case"], parts).train()
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-4)
    ids = random_tokens(task["tokens"])
    for step in range(2):
        if step == 1:
            rest = reset_peak() - before
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        if step == 0:
            untrained = loss.item()
        optimizer.step()
        optimizer.zero_grad()
    peak = resident_bytes("VmHWM") - before
    return {
        "stored": stored,
        "learns": sum(p.numel() for p in learns),
        "rest": rest,
        "peak": peak,
        "loss": untrained,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status, 1 if a bar was missed."""
    if (task := child_task(arguments)) is not None:
        print(json.dumps(child(task)))
        return 0
    options = parser("Peak memory of one training step.", "lora_memory.py")
    options.add_argument("--tokens", type=int, default=None, help=f"of the batch (default: {TOKENS})")
    options = parse(options, arguments, repeats=1)
    tokens = options.tokens or (64 if options.quick else TOKENS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = bench_checkpoint(Path(temporary) / "fp8", options.quick, dtype="fp8")
        task = {"model": str(folder), "tokens": tokens, "threads": options.threads}
        results = {}
        for case in CASES:
            progress(case)
            results[case] = run_child(__file__, task | {"case": case}, child if options.quick else None)
        progress("")
    weights = results["full fine-tuning"]["stored"]
    rows = [
        [case, result["learns"] / 1e6, *(result[name] / weights for name in ("stored", "rest", "peak"))]
        for case, result in results.items()
    ]
    own, peft = (results[f"LoRA: attention, {name}experts"]["peak"] for name in ("", "PEFT's "))
    fp8 = results["LoRA on FP8: attention, experts"]["peak"]
    # adapters begin with nothing, on the same weights
    losses = [result["loss"] for case, result in results.items() if "nf4" not in case]
    bars = [
        Bar("difference of the losses before training, nf4 left out", max(losses) - min(losses), 0.01, at_least=False),
        Bar("peak of LoRA on experts, over PEFT's own", None if options.quick else own / peft, 0.9, at_least=False),
        Bar("peak of LoRA on FP8, over the same on bf16", None if options.quick else fp8 / own, 0.9, at_least=False),
    ]
    setting = (
        f"{weights / 1e6:.0f} MB of weights in bf16, rank {RANK}, {tokens} tokens, gradient checkpointing, "
        "AdamW; the last three columns over the weights in bf16, memory beyond what the process held before loading"
    )
    headings = ["step", "parameters that learn, millions", "weights as stored", "between steps", "peak of a step"]
    return finish(options.json, setting, headings, rows, bars)


if __name__ == "__main__":
    sys.exit(main())
