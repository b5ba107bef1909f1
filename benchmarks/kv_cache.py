"""Bytes of MiMo-V2.5's KV cache at 262144 tokens, measured on one layer of each type in its real geometry.

    python benchmarks/kv_cache.py

Keys and values are written through HybridCache in chunks, as a chunked prefill does, and the bytes are multiplied by
the number of layers of each type. Stored: the rows in use. Allocated: with spare rows, so that appending does not
copy; spare rows take memory only once written. Resident: what this process grew by. Needs Linux.
"""

import sys

import torch
from common import GIB, Bar, finish, parse, parser, progress, reset_peak, resident_bytes, settled_bytes

from modeling_mimo import HybridCache, MiMoV2Config


TOKENS = 262144
# a prefill in steps larger than an eighth of the context leaves 256 spare rows; smaller steps leave up to an eighth
CHUNK = 65536
KINDS = ("full_attention", "sliding_attention")


def fill_layer(config: MiMoV2Config, kind: str, tokens: int, chunk: int) -> dict:
    """Bytes and rows of the one layer of `kind` in a two-layer config after `tokens` tokens in chunks."""
    geometry, index = config.attention_geometry(kind), config.layer_types.index(kind)
    cache, most_rows = HybridCache(config), 0
    keys, values = (
        torch.ones(1, geometry.num_key_value_heads, chunk, width, dtype=torch.bfloat16)
        for width in (geometry.head_dim, geometry.v_head_dim)
    )
    before = reset_peak()
    for start in range(0, tokens, chunk):
        progress(f"{kind}: {start}/{tokens}")
        rows = min(chunk, tokens - start)
        cache.update(keys[:, :, :rows], values[:, :, :rows], index)
        most_rows = max(most_rows, cache.layers[index].buffers[0].shape[2])
    progress("")
    layer = cache.layers[index]
    if layer.get_seq_length() != tokens:
        raise ValueError(f"{kind}: expected {tokens} tokens in the cache, got {layer.get_seq_length()}")
    peak = resident_bytes("VmHWM") - before
    return {
        "stored": sum(part.numel() * part.element_size() for part in layer.live_rows()),
        "allocated": sum(buffer.nbytes for buffer in layer.buffers),
        "resident": settled_bytes() - before,
        "peak": peak,
        "most_rows": most_rows,
        "per_token": (keys.nbytes + values.nbytes) // chunk,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("Bytes of the KV cache of MiMo-V2.5 at 262144 tokens.", "kv_cache.py --chunk 8192")
    options.add_argument("--tokens", type=int, default=None, help=f"context (default: {TOKENS})")
    options.add_argument("--chunk", type=int, default=CHUNK, help=f"tokens per update (default: {CHUNK})")
    options = parse(options, arguments, repeats=1)
    tokens = options.tokens or (8192 if options.quick else TOKENS)
    released = MiMoV2Config(swa_num_key_value_heads=8)
    counts = {kind: released.layer_types.count(kind) for kind in KINDS}
    config = MiMoV2Config(num_hidden_layers=2, layer_types=list(KINDS), swa_num_key_value_heads=8)
    layers = {kind: fill_layer(config, kind, tokens, options.chunk) for kind in KINDS}
    fields = ("stored", "allocated", "resident")
    totals = {field: sum(counts[kind] * layers[kind][field] for kind in KINDS) / GIB for field in fields}
    full = sum(counts[kind] * layers[kind]["per_token"] * tokens for kind in KINDS) / GIB
    rows = [
        [kind, counts[kind], layers[kind]["per_token"], *(layers[kind][field] / 2**20 for field in fields)]
        for kind in KINDS
    ]
    rows.append(["all layers", sum(counts.values()), None, *(totals[field] * 1024 for field in fields)])
    rows.append(["all layers, all of them global", sum(counts.values()), None, full * 1024, None, None])
    window = config.sliding_window
    setting = f"{tokens} tokens in chunks of {options.chunk}, batch 1, bf16. MiB of one layer of each type and of all."
    peak = layers["full_attention"]["peak"] / layers["full_attention"]["resident"]
    notes = [
        f"Full attention everywhere would take {full:.2f} GiB, {full / totals['stored']:.1f} times as much.",
        f"While a global layer grows, its old and new buffers coexist: at most {peak:.2f} times its resident size.",
    ]
    bars = [
        Bar(
            f"GiB allocated at {TOKENS} tokens", totals["allocated"] if tokens == TOKENS else None, 5.7, at_least=False
        ),
        Bar(
            f"rows a sliding layer ever held (window {window})",
            layers["sliding_attention"]["most_rows"],
            window + 64,
            at_least=False,
        ),
    ]
    headings = ["layers", "number", "bytes per token", "stored", "allocated", "resident"]
    return finish(options.json, setting, headings, rows, bars, notes)


if __name__ == "__main__":
    sys.exit(main())
