"""`mimo bench`: how fast a checkpoint reads and writes on this machine, and what its MTP heads bring; with `--micro`,
how often MiMo-Micro is right (`bench_micro.py`)."""

import argparse
import json
import statistics
import time
from pathlib import Path

from .demo import full_attention_bytes, read_text
from .loading import read_config


EXAMPLE = """examples:
  mimo bench /models/MiMo-V2.5 --mtp
  mimo bench /models/MiMo-V2.5 --text book.txt --prompt-tokens 32768 --new-tokens 256 --mtp --json
  mimo bench --micro
  mimo bench --micro --count 400 --task colour --task tone --precision fp8,bf16,nf4

All ways of generating take turns, --repeats times after one turn that does not count; times are medians. "times" is
the speed against plain generation in the same run.

With --micro, the model that comes with the package answers questions about pictures, clips, sounds, texts and sums
that it was never trained on, and some that it knows by heart (tool, story, fact). Each share of right answers stands
beside its 95 % interval, what guessing would get, and the bar that the model is held to. A missed bar is printed, and
is not an error. --mtp drafts behind texts, in float32, where the tokens must be the same.
"""

# what depends on --micro
DEFAULTS = {"prompt_tokens": 512, "new_tokens": 128, "batch": 1, "repeats": 3}
MICRO_DEFAULTS = {
    "prompt_tokens": 48,
    "new_tokens": 256,
    "batch": 16,
    "count": 100,
    "seed": 0,
    "task": [],
    "compare": [],
}

HEADINGS = (
    "drafts",
    "tokens/s",
    "times",
    "tokens/forward",
    "accepted length",
    "accepted per head",
    "draft/verify/other",
)


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "bench",
        help="measure reading, writing, KV cache and MTP drafting of a checkpoint",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        help="a checkpoint: a folder, or the name of a repository (with --micro, by default the shipped one)",
    )
    parser.add_argument("--mtp", action="store_true", help="also generate with 1, 2, ... and 'auto' drafts per step")
    parser.add_argument("--text", type=Path, help="UTF-8 text that prompts are cut from (default: one of the package)")
    parser.add_argument("--prompt-tokens", type=int, help="tokens of each prompt (default: 512; --micro: 48)")
    parser.add_argument("--new-tokens", type=int, help="tokens to generate (default: 128; --micro: 256)")
    parser.add_argument("--batch", type=int, help="prompts at a time (default: 1; --micro: 16)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default: 0)")
    parser.add_argument("--repeats", type=int, help="measurements per median (default: 3)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--device-map", default="auto", help="cpu, cuda, auto, ... (default: auto)")
    parser.add_argument("--fp8-resident", action="store_true", help="keep the weights FP8 in memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    micro = parser.add_argument_group("MiMo-Micro")
    micro.add_argument("--micro", action="store_true", help="measure what MiMo-Micro gets right")
    micro.add_argument("--count", type=int, help="examples per task (default: 100)")
    micro.add_argument("--task", metavar="NAME", action="append", help="repeatable (default: all tasks)")
    micro.add_argument("--seed", type=int, help="which examples (default: 0)")
    micro.add_argument(
        "--precision", metavar="LIST", help="of fp8, bf16, nf4: a column for each, and the loss of the right answers"
    )
    micro.add_argument(
        "--compare", metavar="PATH", action="append", help="with --precision: a column for another checkpoint"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """0. Raises ValueError or OSError for bad input, before a model is loaded where that is possible."""
    check_arguments(args)
    if args.micro:
        from .bench_micro import run_micro

        return run_micro(args)
    text = read_text(args.text)
    read_config(args.path)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from modeling_mimo import MiMoV2FP8Config

    logging.set_verbosity_error()
    quantization = {"quantization_config": MiMoV2FP8Config(dequantize=False)} if args.fp8_resident else {}
    tokenizer = AutoTokenizer.from_pretrained(args.path)
    prompts = cut_prompts(tokenizer(text).input_ids, args.batch, args.prompt_tokens)
    model = AutoModelForCausalLM.from_pretrained(
        args.path, dtype=args.dtype, device_map=args.device_map, load_towers=False, **quantization
    )
    if args.mtp and model.model.mtp is None:
        raise ValueError(f"`--mtp`: expected a checkpoint with MTP heads, got {args.path} without.")
    result = measure(model, prompts.to(model.device), args)
    print(json.dumps(result, indent=2) if args.json else as_text(result))
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Fills in defaults. ValueError: a number out of its range, no PATH, an argument of --micro without it."""
    if not args.micro:
        if args.path is None:
            raise ValueError("`PATH`: expected a checkpoint, got none; only --micro needs none.")
        for name in ("count", "task", "seed", "precision", "compare"):
            if getattr(args, name) is not None:
                raise ValueError(f"`--{name}`: expected --micro with it, got none.")
    elif args.repeats is not None:
        raise ValueError("`--repeats`: expected none with --micro, which asks each question once, got one.")
    for name, value in (MICRO_DEFAULTS if args.micro else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("prompt_tokens", "new_tokens", "batch", "count" if args.micro else "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}`: expected at least 1, got {getattr(args, name)}.")
    for name in ("temperature", *(["seed"] if args.micro else [])):
        if getattr(args, name) < 0:
            raise ValueError(f"`--{name}`: expected at least 0, got {getattr(args, name)}.")


def cut_prompts(ids: list[int], batch: int, length: int):
    """[batch, length] ids from places all over the text, which is repeated where it is too short."""
    import torch

    needed = max(batch, length)
    text = torch.tensor(ids * -(-needed // len(ids)))
    starts = [index * (len(text) - length) // batch for index in range(batch)]
    return torch.stack([text[start : start + length] for start in starts])


def measure(model, prompts, args: argparse.Namespace) -> dict:
    """The JSON object of `mimo bench`."""
    import torch
    from tqdm import tqdm

    from modeling_mimo import HybridCache

    modes = ["plain"]
    if args.mtp:
        modes += [*range(1, len(model.model.mtp.layers) + 1), "auto"]
    runs: dict = {mode: [] for mode in modes}
    prefills = []
    # disable=None: no bar where stderr is not a terminal
    with tqdm(total=(args.repeats + 1) * (len(modes) + 1), desc="bench", disable=None) as bar:
        for repeat in range(args.repeats + 1):
            cache = HybridCache(model.config)
            start = time.perf_counter()
            with torch.inference_mode():
                # reading the logit waits for the device
                model(prompts, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1, 0].item()
            prefills += [time.perf_counter() - start] if repeat else []
            bar.update()
            for mode in modes:
                run = generate(model, prompts, mode, args)
                runs[mode] += [run] if repeat else []
                bar.update()
    plain = statistics.median(run["seconds"] for run in runs["plain"])
    rows = [summary(mode, runs[mode], plain, args) for mode in modes]
    cache_bytes = cache.nbytes()["total"]
    return {
        "model": args.path,
        "parameters": model.num_parameters(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": args.batch,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "prefill_tokens_per_second": prompts.numel() / statistics.median(prefills),
        "cache_bytes": cache_bytes,
        "cache_bytes_all_global": args.batch
        * full_attention_bytes(model.config, cache.get_seq_length(), model.dtype.itemsize),
        "same_tokens": all(run["tokens"] == runs["plain"][0]["tokens"] for mode in modes for run in runs[mode])
        if args.temperature == 0
        else None,
        "rows": rows,
    }


def generate(model, prompts, mode, args: argparse.Namespace) -> dict:
    """Seconds, tokens and statistics of one way to generate; sampling begins with the same seed every time."""
    import torch

    torch.manual_seed(0)
    options = {"do_sample": False}
    if args.temperature > 0:
        options = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    if mode != "plain":
        options |= {"use_mtp": True, "mtp_depth": mode}
    start = time.perf_counter()
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=args.new_tokens,
        min_new_tokens=args.new_tokens,
        return_dict_in_generate=True,
        **options,
    )
    tokens = output.sequences[:, prompts.shape[1] :].tolist()
    return {
        "seconds": time.perf_counter() - start,
        "tokens": tokens,
        "stats": None if mode == "plain" else output.mtp_stats,
    }


def summary(mode, runs: list[dict], plain: float, args: argparse.Namespace) -> dict:
    seconds = statistics.median(run["seconds"] for run in runs)
    row = {
        "drafts": mode,
        "tokens_per_second": args.batch * args.new_tokens / seconds,
        "times_plain": plain / seconds,
    }
    stats = runs[-1]["stats"]
    if stats is not None:
        row |= {
            "tokens_per_forward": stats.tokens_per_forward,
            "mean_accepted_length": stats.mean_accepted_length,
            "proposed": stats.proposed,
            "accepted": stats.accepted,
            "forwards": stats.forwards,
            "steps_by_drafts": stats.steps,
            "seconds": stats.seconds,
        }
    return row


def as_text(result: dict) -> str:
    """The same for people."""
    saved = result["cache_bytes_all_global"] / result["cache_bytes"]
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters, {result['dtype']} on {result['device']}",
        f"batch {result['batch']}, {result['prompt_tokens']:,} tokens each, {result['new_tokens']:,} generated",
        f"prefill: {result['prefill_tokens_per_second']:,.0f} tokens/s",
        f"KV cache behind it: {result['cache_bytes'] / 2**20:,.1f} MiB, all layers global: {saved:.1f} times as much",
        "",
    ]
    table = [HEADINGS]
    for row in result["rows"]:
        cells = [str(row["drafts"]), f"{row['tokens_per_second']:,.1f}", f"{row['times_plain']:.2f}"]
        if "forwards" in row:
            shares = [f"{done / max(1, asked):.0%}" for done, asked in zip(row["accepted"], row["proposed"])]
            total = sum(row["seconds"].values())
            parts = [f"{part / total:.0%}" for part in row["seconds"].values()]
            cells += [f"{row['tokens_per_forward']:.2f}", f"{row['mean_accepted_length']:.2f}"]
            cells += [" ".join(shares), " ".join(parts)]
        table.append([*cells, *[""] * (len(HEADINGS) - len(cells))])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    if len(result["rows"]) > 1 and result["same_tokens"] is not None:
        same = result["same_tokens"]
        lines += [
            "",
            "the same tokens in every row" if same else "NOT the same tokens in every row (rounding, see docs)",
        ]
    return "\n".join(lines)
