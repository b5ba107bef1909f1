"""Prefill against Transformers' own class for this decoder, with the same weights: time and peak memory.

    python benchmarks/prefill.py --repeats 3

Every measurement is one prefill in a process of its own, after a short one that does not count; the two sides take
turns. Peak extra memory is the largest resident size during the prefill minus the resident size before it. Needs
Linux, and 16 GB of free memory for the other side at 16384 tokens.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import (
    GIB,
    HEADS,
    Bar,
    bench_checkpoint,
    child_task,
    finish,
    interleaved,
    parse,
    parser,
    progress,
    random_tokens,
    reset_peak,
    resident_bytes,
    run_child,
    seconds,
)
from transformers import AutoModelForCausalLM
from transformers.models.mimo_v2_flash import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

import modeling_mimo  # noqa: F401  registers the model


LENGTHS = (2048, 8192, 16384, 32768)
# both sides are run up to here; beyond it the other side's memory is estimated
LONGEST_COMPARED = 16384
SHARED_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "v_head_dim",
    "layer_types",
    "mlp_layer_types",
    "sliding_window",
    "rope_parameters",
    "attention_value_scale",
    "n_routed_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "rms_norm_eps",
    "max_position_embeddings",
]


def load(side: str, folder: str, dtype: torch.dtype = torch.bfloat16):
    if side == "ours":
        # the other class has no MTP layers
        options = {"attn_implementation": "sdpa", "load_mtp": False}
        return AutoModelForCausalLM.from_pretrained(f"{folder}/ours", dtype=dtype, **options).eval()
    path = f"{folder}/transformers"
    return MiMoV2FlashForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def split_weights(model) -> dict[str, torch.Tensor]:
    """The state dict of our model under the other class's names: q, k and v apart, sinks renamed."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("qkv_proj.weight"):
            weights[name.replace("attention_sink_bias", "sinks")] = tensor.contiguous()
            continue
        geometry = model.get_submodule(name.rpartition(".qkv_proj")[0]).geometry
        sizes = [size // geometry.qkv_chunks for size in geometry.qkv_sizes]
        parts = tensor.unflatten(0, (geometry.qkv_chunks, -1)).split(sizes, dim=1)
        for letter, part in zip("qkv", parts):
            weights[name.replace("qkv_proj", f"{letter}_proj")] = part.flatten(0, 1).contiguous()
    return weights


def convert(folder: str) -> dict:
    """Writes the other class's checkpoint with our weights; returns facts about both."""
    ours = load("ours", folder)
    config = ours.config
    if config.swa_num_key_value_heads != 2 * config.num_key_value_heads:
        raise ValueError("swa_num_key_value_heads: expected twice num_key_value_heads, all that the other class knows")
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    with torch.device("meta"):
        other = MiMoV2FlashForCausalLM(MiMoV2FlashConfig(**fields))
    other.load_state_dict(split_weights(ours), assign=True, strict=True)
    other.save_pretrained(f"{folder}/transformers")
    return {
        "parameters": ours.num_parameters(),
        "layers": config.num_hidden_layers,
        "global_layers": config.layer_types.count("full_attention"),
        "heads": config.num_attention_heads,
    }


@torch.inference_mode()
def agreement(folder: str, length: int) -> dict:
    """Logits of both sides on the same tokens, in fp32 and in bf16."""
    tokens, logits = random_tokens(length, seed=1), {}
    for dtype in (torch.float32, torch.bfloat16):
        for side in ("ours", "transformers"):
            logits[side, dtype] = load(side, folder, dtype)(tokens).logits[0].float()
    exact = logits["transformers", torch.float32]
    ours, other = logits["ours", torch.bfloat16], logits["transformers", torch.bfloat16]
    return {
        "fp32_max": (logits["ours", torch.float32] - exact).abs().max().item(),
        "logits_std": exact.std().item(),
        "bf16_max": (ours - other).abs().max().item(),
        "top1": (ours.argmax(-1) == other.argmax(-1)).float().mean().item(),
        "ours_rms": (ours - exact).square().mean().sqrt().item(),
        "transformers_rms": (other - exact).square().mean().sqrt().item(),
        "ours_top1": (ours.argmax(-1) == exact.argmax(-1)).float().mean().item(),
        "transformers_top1": (other.argmax(-1) == exact.argmax(-1)).float().mean().item(),
    }


@torch.inference_mode()
def prefill(side: str, folder: str, length: int) -> dict:
    model, tokens = load(side, folder), random_tokens(length)
    model(tokens[:, :256], logits_to_keep=1)
    before = reset_peak()
    result = {}
    took = seconds(lambda: result.update(output=model(tokens, logits_to_keep=1)))
    extra = resident_bytes("VmHWM") - before
    return {
        "seconds": took,
        "extra": extra,
        "top": result["output"].logits[0, -1].float().topk(10).indices.tolist(),
        "experts": model.config._experts_implementation,
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.inference_mode()
def layer_growth(folder: str, lengths: tuple[int, int], repeats: int) -> dict:
    """Median seconds of one attention module of each type, without a cache, at two lengths."""
    model = load("ours", folder).model
    medians = {}
    for kind in ("sliding_attention", "full_attention"):
        functions = {}
        attention = model.layers[model.config.layer_types.index(kind)].self_attn
        for length in lengths:
            states = torch.randn(1, length, model.config.hidden_size, dtype=torch.bfloat16)
            rotary = model.rotary_emb(states, torch.arange(length)[None], kind)
            functions[f"{kind} {length}"] = lambda a=attention, s=states, r=rotary: a(s, r)
        # a global layer takes 11 s at 32768 tokens, a sliding one 1 s
        medians |= interleaved(functions, 3 * repeats if kind == "sliding_attention" else repeats)
    return medians


def run_task(task: dict) -> dict:
    """What a child process does."""
    if task["do"] == "prefill":
        return prefill(task["side"], task["folder"], task["length"])
    if task["do"] == "layers":
        return layer_growth(task["folder"], task["lengths"], task["repeats"])
    return convert(task["folder"]) if task["do"] == "convert" else agreement(task["folder"], task["length"])


def measure(lengths, longest: int, repeats: int, child) -> dict:
    """{length: {side: {"seconds", "extra", ...}}}, medians of `repeats` children, the sides in turn."""
    results = {}
    for length in lengths:
        sides = ("ours", "transformers") if length <= longest else ("ours",)
        runs = {side: [] for side in sides}
        # one prefill of 16384 tokens takes Transformers five minutes
        repeats = repeats if length <= 8192 else 1
        for repeat in range(repeats):
            for side in sides:
                progress(f"{length} tokens, {repeat + 1}/{repeats}, {side}")
                runs[side].append(child(do="prefill", side=side, length=length))
        results[length] = {
            side: done[0] | {key: statistics.median(run[key] for run in done) for key in ("seconds", "extra")}
            for side, done in runs.items()
        }
    progress("")
    return results


def table_rows(results: dict) -> list[list]:
    rows = []
    compared = max((length for length, sides in results.items() if "transformers" in sides), default=None)
    for length, sides in results.items():
        ours, other = sides["ours"], sides.get("transformers")
        if other:
            same = len(set(ours["top"]) & set(other["top"]))
            # a small prefill may fit into what an earlier one has left
            speed, memory = other["seconds"] / ours["seconds"], other["extra"] / max(1, ours["extra"])
            side = [other["seconds"], speed, f"{other['extra'] / GIB:.2f}", memory, f"{same}/10"]
        elif compared:
            needed = results[compared]["transformers"]["extra"] * (length / compared) ** 2
            side = [None, None, f"about {needed / GIB:.0f}, not run", needed / max(1, ours["extra"]), None]
        else:
            side = [None] * 5
        rows.append([length, ours["seconds"], side[0], side[1], ours["extra"] / GIB, *side[2:]])
    return rows


def required(results: dict, growth: float | None, check: dict) -> list[Bar]:
    def ratio(length: int, key: str) -> float | None:
        sides = results.get(length, {})
        return sides["transformers"][key] / sides["ours"][key] if "transformers" in sides else None

    finished = results.get(32768, {}).get("ours", {}).get("seconds")
    return [
        Bar("largest difference of fp32 logits", check["fp32_max"], 1e-4, at_least=False),
        Bar("times faster at 8192 tokens", ratio(8192, "seconds"), 10),
        Bar("times faster at 16384 tokens", ratio(16384, "seconds"), 15),
        Bar("times less peak extra memory at 16384 tokens", ratio(16384, "extra"), 10),
        Bar("prefills of 32768 tokens that ran through", None if finished is None else 1, 1),
        Bar("growth of a sliding layer's time from 8192 to 32768 tokens", growth, 4.4, at_least=False),
    ]


def notes_on(check: dict, layers: dict, lengths: tuple[int, int], results: dict) -> list[str]:
    low, high = lengths
    notes = [
        f"Logits of {check['length']} tokens (standard deviation {check['logits_std']:.2f}): bf16 differs by at most "
        f"{check['bf16_max']:.3g} and agrees on the best token at {check['top1']:.1%} of the positions. Against the "
        f"fp32 logits: ours rms {check['ours_rms']:.3g}, best token {check['ours_top1']:.1%}; Transformers' rms "
        f"{check['transformers_rms']:.3g}, best token {check['transformers_top1']:.1%}.",
    ]
    for kind in ("sliding_attention", "full_attention"):
        short, long = layers[f"{kind} {low}"], layers[f"{kind} {high}"]
        notes.append(
            f"One {kind} module: {short * 1e3:.1f} ms at {low} tokens, {long * 1e3:.1f} ms at {high}, "
            f"{long / short:.2f} times as long for {high / low:.0f} times the tokens."
        )
    for side, facts in next(iter(results.values())).items():
        notes.append(
            f"{side}: {facts['dtype']}, attention `{facts['attention']}`, experts `{facts['experts']}`, the default."
        )
    return notes


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    if task := child_task(arguments):
        print(json.dumps(run_task(task)))
        return 0
    options = parser("Prefill time and memory against Transformers' mimo_v2_flash.", "prefill.py --length 8192")
    options.add_argument("--length", type=int, action="append", help="tokens; may be given more than once")
    options.add_argument("--heads", type=int, default=HEADS, help=f"query heads of the model (default: {HEADS})")
    options = parse(options, arguments, repeats=3)
    lengths = sorted(options.length or ((64, 256) if options.quick else LENGTHS))
    pair, compared = ((128, 512), 128) if options.quick else ((8192, 32768), 512)
    with tempfile.TemporaryDirectory() as folder:

        def child(**task) -> dict:
            task |= {"folder": folder, "threads": options.threads}
            return run_child(__file__, task, run_task if options.quick else None)

        bench_checkpoint(Path(folder, "ours"), options.quick, options.heads)
        facts = child(do="convert")
        progress("comparing the logits of both sides")
        check = {"length": compared} | child(do="agreement", length=compared)
        layers = child(do="layers", lengths=pair, repeats=options.repeats)
        results = measure(lengths, LONGEST_COMPARED, options.repeats, child)
    growth = layers[f"sliding_attention {pair[1]}"] / layers[f"sliding_attention {pair[0]}"]
    setting = (
        f"{facts['parameters'] / 1e6:.0f}M parameters, {facts['layers']} layers, {facts['global_layers']} of them "
        f"global, {facts['heads']} heads; batch 1, bf16, with cache; median of {options.repeats}, above "
        "8192 tokens one run. Memory is the peak during the prefill minus what was resident before."
    )
    headings = ["tokens", "ours, s", "Transformers, s", "times faster", "ours, GiB", "Transformers, GiB"]
    headings += ["times less memory", "same best 10 tokens"]
    bars = required(results, None if options.quick else growth, check)
    return finish(options.json, setting, headings, table_rows(results), bars, notes_on(check, layers, pair, results))


if __name__ == "__main__":
    sys.exit(main())
