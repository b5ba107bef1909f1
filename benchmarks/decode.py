"""Decoding at a long context: this package's HybridCache against Transformers' DynamicCache under the same model.

    python benchmarks/decode.py --context 32768

Both caches hold the same random keys and values; the model then decodes greedily, a few tokens on one side, a few on
the other, in turn. Both sides must choose the same tokens.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import Bar, bench_checkpoint, finish, parse, parser, progress, seconds
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_mimo import HybridCache


CONTEXT = 32768
TOKENS = 8


def fill(cache, config, context: int):
    """`context` tokens of random keys and values in every layer, the same for each cache; returns the cache."""
    generator = torch.Generator().manual_seed(0)
    for index, layer_type in enumerate(config.layer_types):
        geometry = config.attention_geometry(layer_type)
        shape = (1, geometry.num_key_value_heads, context)
        keys, values = (
            torch.randn(*shape, width, generator=generator).bfloat16()
            for width in (geometry.head_dim, geometry.v_head_dim)
        )
        cache.update(keys, values, index)
    return cache


class Decoder:
    """One side: a cache and the tokens chosen so far."""

    def __init__(self, model, cache):
        self.model, self.cache, self.tokens = model, cache, [1]

    @torch.inference_mode()
    def step(self, count: int) -> None:
        for _ in range(count):
            logits = self.model(torch.tensor([self.tokens[-1:]]), cache=self.cache).logits
            self.tokens.append(logits[0, -1].argmax().item())


def measure(model, context: int, repeats: int) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Median seconds per token and the chosen tokens of each side."""
    caches = {"HybridCache": HybridCache(model.config), "DynamicCache": DynamicCache(config=model.config)}
    sides = {name: Decoder(model, fill(cache, model.config, context)) for name, cache in caches.items()}
    times = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            progress(f"{repeat}/{repeats} {name}")
            took = seconds(lambda s=side: s.step(TOKENS))
            if repeat:
                times[name].append(took / TOKENS)
    progress("")
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians, {name: side.tokens for name, side in sides.items()}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("Tokens per second with HybridCache and with DynamicCache.", "decode.py --context 16384")
    options.add_argument("--context", type=int, default=None, help=f"tokens in the cache (default: {CONTEXT})")
    # 16 query heads make 4 KV heads in global layers, as many as MiMo-V2.5 has
    options.add_argument("--heads", type=int, default=16, help="query heads of the model (default: 16)")
    options = parse(options, arguments, repeats=7)
    context = options.context or (512 if options.quick else CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        path = bench_checkpoint(Path(folder, "model"), options.quick, options.heads)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    times, tokens = measure(model, context, options.repeats)
    base = times["DynamicCache"]
    rows = [[name, context, 1 / took, took * 1e3, base / took] for name, took in times.items()]
    same = tokens["HybridCache"] == tokens["DynamicCache"]
    setting = (
        f"{model.num_parameters() / 1e6:.0f}M parameters, {model.config.num_hidden_layers} layers, "
        f"{model.config.layer_types.count('full_attention')} of them global, {model.config.num_attention_heads} "
        f"heads; batch 1, bf16; median of {options.repeats} times {TOKENS} tokens."
    )
    bars = [
        Bar("same tokens on both sides", float(same), 1),
        Bar(f"times the tokens per second of DynamicCache at {context}", None if options.quick else rows[0][4], 1.5),
    ]
    headings = ["cache", "context", "tokens/s", "ms per token", "times faster"]
    return finish(options.json, setting, headings, rows, bars)


if __name__ == "__main__":
    sys.exit(main())
