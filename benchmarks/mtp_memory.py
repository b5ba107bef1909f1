"""Memory and file reads of drafting, against Transformers' own MTP loop on the same trunk and weights.

    python benchmarks/mtp_memory.py --context 32768

Transformers' loop chains the heads and feeds them normed states, so its drafts are not this model's; what is compared
is what a prompt costs it. Its heads get this package's windowed attention without a mask: with the mask that it builds
they need scores of heads x tokens x tokens, 34 GB here. Each side runs in a process of its own.
"""

import json
import sys
import tempfile
from pathlib import Path

import safetensors
import torch
import transformers
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
    seconds,
)
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import MtpModel

from modeling_mimo.cache_names_mimo_v2 import takes_cache


CONTEXT = 32768
TOKENS = 8
CALLS = 2
SIDES = ("no drafts", "this package", "Transformers")


def for_transformers(model) -> None:
    """What Transformers' loop looks for in a model and its config."""
    model.config.mtp_layer_types = ["sliding_attention"] * 3
    model.config.mtp_mlp_layer_types = ["dense"] * 3
    model._keys_to_ignore_on_load_unexpected = [r"^model\.mtp\."]
    model._weight_conversions = [
        WeightRenaming("pre_mlp_layernorm", "post_attention_layernorm"),
        WeightRenaming(r"mtp_block\.final_layernorm", "post_norm"),
    ]
    # the loop of Transformers 5.23 hands its cache to the layers as `past_key_values`
    attention = type(model.model.layers[0].self_attn)
    attention.forward = takes_cache(attention.forward)
    MtpModel.create_masks_for_mtp_layer = lambda *args, **kwargs: {"attention_mask": None}


def counting_opens() -> list:
    """Every weight file that is opened from now on."""
    opened = []
    for module in (safetensors, transformers.modeling_layers, transformers.modeling_utils):

        def opening(file, *args, opener=module.safe_open, **kwargs):
            opened.append(file)
            return opener(file, *args, **kwargs)

        module.safe_open = opening
    return opened


def child(task: dict) -> dict:
    """Peak, seconds and tokens of the last of CALLS generations behind the prompt, and files opened by all of them."""
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])).eval()
    generate, options = type(model).generate, {}
    if task["side"] == "Transformers":
        for_transformers(model)
        generate, options = GenerationMixin.generate, {"use_mtp": True}
    elif task["side"] == "this package":
        options = {"use_mtp": True}
    ids, opened, result = random_tokens(task["context"]), counting_opens(), {}
    for _ in range(CALLS):
        before = reset_peak()
        took = seconds(
            lambda: result.update(
                tokens=generate(
                    model,
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=TOKENS,
                    do_sample=False,
                    eos_token_id=None,
                    **options,
                )
            )
        )
        peak = resident_bytes("VmHWM") - before
    chosen = result["tokens"][0, -TOKENS:].tolist()
    return {"peak": peak, "opened": len(opened), "seconds": took, "tokens": chosen}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    task = child_task(arguments)
    if task is not None:
        print(json.dumps(child(task)))
        return 0
    options = parser("Memory of drafting behind a long prompt.", "mtp_memory.py --context 32768")
    options.add_argument("--context", type=int, default=None, help=f"tokens of the prompt (default: {CONTEXT})")
    options = parse(options, arguments, repeats=1)
    context = options.context or (128 if options.quick else CONTEXT)
    # bfloat16 rounds a token alone and one of several in other ways, which may choose another
    dtype = "float32" if options.quick else "bfloat16"
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = bench_checkpoint(Path(folder, "model"), options.quick)
        for side in SIDES:
            progress(side)
            task = {"model": str(path), "side": side, "context": context, "threads": options.threads, "dtype": dtype}
            results[side] = run_child(__file__, task)
    progress("")
    plain = results["no drafts"]["peak"]
    extra = {side: max(0, result["peak"] - plain) for side, result in results.items()}
    rows = [
        [side, result["peak"] / 2**20, extra[side] / 2**20, result["opened"], result["seconds"]]
        for side, result in results.items()
    ]
    ratio = extra["this package"] / max(1, extra["Transformers"])
    same = results["this package"]["tokens"] == results["no drafts"]["tokens"]
    bars = [
        Bar("same tokens with and without drafts", float(same) if options.quick else None, 1),
        Bar("extra memory over Transformers' extra memory", None if options.quick else ratio, 1 / 20, at_least=False),
        Bar("weight files opened while generating", results["this package"]["opened"], 0, at_least=False),
    ]
    setting = (
        f"{context} tokens of prompt, {TOKENS} generated greedily, {dtype}; {CALLS} calls of which the last counts "
        "for memory; MiB above what was resident before the call, `extra` above generation without drafts; files over "
        "all calls."
    )
    headings = ["loop", "peak MiB", "extra MiB", "files opened", "seconds"]
    return finish(options.json, setting, headings, rows, bars)


if __name__ == "__main__":
    sys.exit(main())
