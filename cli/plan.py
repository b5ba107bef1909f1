"""`mimo plan`: how much memory a checkpoint needs for a context, by formulas that are printed, and what is here."""

import argparse
import json
import math
from pathlib import Path


EXAMPLE = """\
examples:
  mimo plan MiMo-V2.5 --context 256K
  mimo plan /models/MiMo-V2.5-Pro --context 32K --batch 4 --dtype bf16 --json
  mimo plan MiMo-V2.5 --gpu-mem 24GB --cpu-mem 64GB     where device_map would put what, bytes fetched per token
"""

BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}

# the cache of a sliding layer holds its window and twice the default of 32 tokens that can be rolled back
ROLLBACK_ROWS = 2 * 32

# the buffers of a global layer are reserved with at most this share to spare
CACHE_SPARE = 8

# query rows per step of masked global attention
QUERY_BLOCK = 512

WEIGHTS_FORMULA = (
    "fp8: FP8 bytes and F32 scales, rows of each qkv_proj chunk padded to a multiple of 128; "
    "else parameters x bytes, the router in fp32 (V2.6: bf16)"
)
KV_FORMULA = (
    "global layers: batch x context x kv_heads x (head_dim + v_head_dim) x bytes, up to 1/8 of it in reserve; "
    f"sliding layers: window + {ROLLBACK_ROWS} rows instead of context"
)
ACTIVATIONS_FORMULA = (
    "estimate: 4 bytes x batch x chunk x (2 x hidden + max(qkv rows + heads x v_head_dim, 3 x intermediate, "
    f"4 x experts per token x hidden)) + batch x {QUERY_BLOCK} x context x bytes of one mask "
    "+ batch x vocab x 4 bytes of logits + the largest weight dequantized (fp8)"
)


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "plan",
        help="memory that weights, KV cache and activations need, and whether it is here",
        description="Memory for a checkpoint and a context. K is 1024, M is 1024 x 1024.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="a folder with config.json, or the name of a release")
    parser.add_argument(
        "--context", metavar="TOKENS", help="tokens per sequence, e.g. 256K (default: the config's most)"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (default: 1)")
    parser.add_argument("--dtype", choices=sorted(BYTES), help="of the weights in memory (default: as released)")
    parser.add_argument("--prefill-chunk", metavar="TOKENS", default="4K", help="prompt tokens per step (default: 4K)")
    parser.add_argument(
        "--gpu-mem", metavar="SIZES", help="for weights on GPUs, e.g. 24GB or 80GB,80GB: plan a device map"
    )
    parser.add_argument(
        "--cpu-mem", metavar="SIZE", help="for weights in CPU memory, e.g. 64GB: the rest goes to disk"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def parse_tokens(text: str, field: str) -> int:
    """`"256K"`, `"1M"`, `"32768"` -> tokens, K = 1024. ValueError names `field`."""
    number = text[:-1] if text[-1:].upper() in ("K", "M") else text
    if not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise ValueError(f"{field}: expected a positive number of tokens such as 32768, 256K or 1M, got {text!r}.")
    return int(number) * {"K": 1024, "M": 1024**2}.get(text[-1].upper(), 1)


def run(args: argparse.Namespace) -> int:
    """0, whether it fits or not. Raises ValueError, OSError or NotImplementedError on bad input."""
    from .releases import read_target

    target = read_target(args.path)
    if target.config is None:
        raise ValueError(f"{target.name}: expected config.json in a folder, or the name of a release, got none.")
    most = target.config.max_position_embeddings
    context = most if args.context is None else parse_tokens(args.context, "--context")
    if context > most:
        raise ValueError(f"--context: expected at most max_position_embeddings={most} tokens, got {context}.")
    if args.batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {args.batch}.")
    chunk = min(parse_tokens(args.prefill_chunk, "--prefill-chunk"), context)
    plan = {"name": target.name, "context": context, "batch": args.batch, "prefill_chunk": chunk}
    plan["weights"] = plan_weights(target.config, target.tensors, args.dtype)
    dtype = plan["weights"]["dtype"]
    # FP8 weights compute in bf16
    width = max(BYTES[dtype], 2)
    plan["kv"] = plan_kv(target.config, context, args.batch, width)
    plan["activations"] = plan_activations(target.config, context, args.batch, chunk, width, dtype == "fp8")
    needed = [plan["weights"]["total"], plan["kv"]["total"], plan["kv"]["reserve"], plan["activations"]["total"]]
    plan["total"] = sum(needed)
    plan["machine"] = machine()
    plan["verdict"] = verdict(plan["total"], **plan["machine"])
    if args.gpu_mem is not None or args.cpu_mem is not None:
        plan["placement"] = placement(target, dtype, args)
    print(json.dumps(plan, indent=2) if args.json else as_text(plan))
    return 0


def placement(target, dtype: str, args: argparse.Namespace) -> dict:
    """`plan_placement` for the memory given on the command line."""
    from .plan_placement import parse_memory, plan_placement

    gpus = parse_memory(args.gpu_mem, "--gpu-mem") if args.gpu_mem is not None else []
    (cpu, *more) = parse_memory(args.cpu_mem, "--cpu-mem") if args.cpu_mem is not None else [0]
    if more:
        raise ValueError(f"--cpu-mem: expected one size, got {args.cpu_mem!r}.")
    return plan_placement(target.config, target.tensors, dtype, gpus, cpu)


def plan_weights(config, tensors, dtype: str | None) -> dict:
    """Bytes in memory by part, from headers where there are some, else from the table of the config."""
    from modeling_mimo.checkpoint_mimo_v2 import check_tensors, sum_parts, take_mtp_layers_from_files
    from modeling_mimo.mxfp4_mimo_v2 import MXFP4_GROUP
    from modeling_mimo.weight_mapping_mimo_v2 import FP8_BLOCK, released_tensors

    quantization = config.to_dict().get("quantization_config") or {}
    layout, fp8 = config.fused_qkv_layout or "chunked", bool(quantization)
    if tensors is not None:
        take_mtp_layers_from_files(config, tensors)
        report = check_tensors(config, tensors)
        layout, fp8 = report.layout, report.fp8
    dtype = dtype or ("fp8" if fp8 else "bf16")
    if dtype == "fp8" and not fp8:
        raise ValueError("--dtype: expected bf16, fp16 or fp32 for a checkpoint without FP8 weights, got 'fp8'.")
    # CODEPATH: V2.6 stores its experts as mxfp4, every other release as fp8
    mxfp4 = dtype == "fp8" and quantization.get("store_dtype") == "mxfp4"
    router_bytes = 2 if config.moe_router_dtype == "bfloat16" else 4
    table = released_tensors(config, "plain" if layout == "plain" else "chunked")
    parts: dict[str, int] = {}
    padding = 0
    for name, spec in table.items() if tensors is None or dtype != "fp8" else ():
        if tensors is not None and name not in tensors:
            continue
        size = math.prod(spec.shape) * (router_bytes if spec.part == "router" else max(BYTES[dtype], 2))
        if dtype == "fp8" and spec.quantized:
            size = math.prod(spec.shape) + 4 * math.prod(spec.scale_shape)
            if mxfp4 and spec.part == "experts":
                size = math.prod(spec.shape) // 2 + math.prod(spec.shape) // MXFP4_GROUP
        parts[spec.part] = parts.get(spec.part, 0) + size
    if tensors is not None and dtype == "fp8":
        parts = {part: sums["bytes"] for part, sums in sum_parts(table, tensors).items()}
    for spec in table.values() if dtype == "fp8" else ():
        if spec.chunks > 1:
            padding += spec.chunks * (-(spec.shape[0] // spec.chunks) % FP8_BLOCK) * spec.shape[1]
    return {
        "dtype": dtype,
        "source": "config" if tensors is None else "headers",
        "parts": parts,
        "qkv_padding": padding,
        "total": sum(parts.values()) + padding,
        "formula": WEIGHTS_FORMULA,
    }


def plan_kv(config, context: int, batch: int, width: int) -> dict:
    """Bytes of the KV cache by layer type, and what it would be if every layer were global."""
    result = {"full_attention": 0, "sliding_attention": 0, "reserve": 0, "all_full": 0, "formula": KV_FORMULA}
    for layer_type in config.layer_types:
        geometry = config.attention_geometry(layer_type)
        row = batch * geometry.num_key_value_heads * (geometry.head_dim + geometry.v_head_dim) * width
        rows = context if geometry.window is None else geometry.window + ROLLBACK_ROWS
        result[layer_type] += rows * row
        result["all_full"] += context * row
    result["reserve"] = result["full_attention"] // CACHE_SPARE
    return result | {"total": result["full_attention"] + result["sliding_attention"]}


def plan_activations(config, context: int, batch: int, chunk: int, width: int, fp8: bool) -> dict:
    """Bytes alive at the widest point of one prefill step of `batch` x `chunk` tokens; an estimate."""
    attention = max(
        sum(geometry.qkv_sizes) + geometry.num_heads * geometry.v_head_dim
        for geometry in map(config.attention_geometry, set(config.layer_types))
    )
    experts = 4 * config.num_experts_per_tok * config.hidden_size
    widest = 2 * config.hidden_size + max(attention, 3 * config.intermediate_size, experts)
    parts = {
        "hidden": 4 * batch * chunk * widest,
        "mask": batch * min(QUERY_BLOCK, chunk) * context * width,
        "logits": 4 * batch * config.vocab_size,
        "dequantized_weight": config.hidden_size * config.intermediate_size * width if fp8 else 0,
    }
    return parts | {"total": sum(parts.values()), "formula": ACTIVATIONS_FORMULA}


def machine() -> dict:
    """`ram`: bytes a new process can have, a container's limit included; `gpus`: name and free bytes of each."""
    import psutil
    import torch

    ram = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        ram = min(ram, max(0, int(text) - int(used.read_text())))
    gpus = [
        {"name": torch.cuda.get_device_name(index), "bytes": torch.cuda.mem_get_info(index)[0]}
        for index in range(torch.cuda.device_count())
    ]
    return {"ram": ram, "gpus": gpus}


def verdict(needed: int, ram: int, gpus: list[dict]) -> str:
    """`fits ...` for the fastest place that has `needed` bytes, else `does not fit: needs X, has Y`."""
    on_gpus = sum(gpu["bytes"] for gpu in gpus)
    if gpus and needed <= on_gpus:
        return f"fits on {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}"
    if needed <= ram:
        return "fits in RAM"
    if needed <= ram + on_gpus:
        return "fits across GPUs and RAM"
    return f"does not fit: needs {_gib(needed)}, has {_gib(ram + on_gpus)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _placement_rows(placement: dict) -> list[tuple[str, int]]:
    rows = []
    for title, part in (('device_map="auto"', placement["auto"]), ("expert_device_map", placement["experts"])):
        rows.append((f"{title}, fetched per token", sum(part["per_token"].values())))
        for device, size in part["devices"].items():
            rows.append((f"  on GPU {device}" if device.isdigit() else f"  on {device}", size))
    return rows


def as_text(plan: dict) -> str:
    """The same for people."""
    weights, kv, activations, here = plan["weights"], plan["kv"], plan["activations"], plan["machine"]
    rows = [(f"weights, {weights['dtype']} (from {weights['source']})", weights["total"])]
    rows += [(f"  {part}", size) for part, size in weights["parts"].items()]
    rows += [("  padding of qkv_proj", weights["qkv_padding"])] if weights["qkv_padding"] else []
    rows += [
        ("KV cache", kv["total"]),
        ("  global layers", kv["full_attention"]),
        ("  sliding layers", kv["sliding_attention"]),
        ("  if all layers were global, instead", kv["all_full"]),
        ("KV cache, reserve at most", kv["reserve"]),
        ("activations", activations["total"]),
        ("total", plan["total"]),
        ("RAM here", here["ram"]),
        *((f"GPU here: {gpu['name']}", gpu["bytes"]) for gpu in here["gpus"]),
        *(_placement_rows(plan["placement"]) if "placement" in plan else ()),
    ]
    lines = [f"{plan['name']}: {plan['batch']} x {plan['context']:,} tokens, prefill by {plan['prefill_chunk']:,}"]
    lines += [f"{label:<40}{_gib(size):>16}" for label, size in rows]
    parts = ("weights", "kv", "activations", "placement")
    lines += [f"{part}: {plan[part]['formula']}" for part in parts if part in plan]
    if "placement" in plan and not plan["placement"]["experts"]["fits"]:
        lines.append("expert_device_map: what is no expert does not fit where it computes")
    return "\n".join([*lines, plan["verdict"]])
