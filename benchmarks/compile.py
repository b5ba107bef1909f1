"""The decode step compiled with static shapes, against the same step uncompiled and against HybridCache.

    python benchmarks/compile.py --context 2048

Every side decodes greedily behind the same random prompt, a few tokens in turn, and must choose the same tokens.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import Bar, bench_checkpoint, finish, parse, parser, progress, random_tokens, seconds
from transformers import AutoModelForCausalLM, StaticCache

from modeling_mimo import HybridCache


CONTEXT = 2048
TOKENS = 8

# name -> (cache, experts_implementation, compiled)
SIDES = {
    "HybridCache, not compiled": ("hybrid", "eager", False),
    "static, not compiled": ("static", "eager", False),
    # in a graph batched_mm stands for the loop over hit experts
    "static, compiled": ("static", "eager", True),
    "static, compiled, grouped_mm": ("static", "grouped_mm", True),
}


class Decoder:
    """One side: a cache, a way to run the model, and the tokens chosen so far."""

    def __init__(self, model, cache, experts: str, backend: str | None, prompt: torch.Tensor):
        self.model, self.cache, self.experts = model, cache, experts
        self.forward = torch.compile(model.forward, fullgraph=True, backend=backend) if backend else model.forward
        self.length, self.tokens = prompt.shape[1], []
        with torch.no_grad():
            self.choose(model(prompt, cache=cache, logits_to_keep=1))

    def choose(self, output) -> None:
        self.tokens.append(output.logits[0, -1].argmax().item())

    @torch.no_grad()
    def step(self, count: int) -> None:
        self.model.set_experts_implementation(self.experts)
        for _ in range(count):
            position = torch.tensor([[self.length]])
            ids = torch.tensor([self.tokens[-1:]])
            self.choose(self.forward(ids, position_ids=position, cache=self.cache))
            self.length += 1


def measure(
    model, context: int, repeats: int, backend: str
) -> tuple[dict[str, float], dict[str, float], dict[str, list[int]]]:
    """Median seconds per token, seconds of the first tokens (compilation) and chosen tokens of each side."""
    prompt = random_tokens(context) % model.config.vocab_size
    longest = context + TOKENS * (repeats + 1) + 1
    sides, times, first = {}, {}, {}
    for name, (kind, experts, compiled) in SIDES.items():
        cache = HybridCache(model.config) if kind == "hybrid" else StaticCache(model.config, max_cache_len=longest)
        sides[name] = Decoder(model, cache, experts, backend if compiled else None, prompt)
        times[name] = []
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            progress(f"{repeat}/{repeats} {name}")
            took = seconds(lambda s=side: s.step(TOKENS))
            if repeat:
                times[name].append(took / TOKENS)
            else:
                first[name] = took
    progress("")
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians, first, {name: side.tokens for name, side in sides.items()}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("Seconds per token of the compiled decode step.", "compile.py --context 4096")
    options.add_argument("--context", type=int, default=None, help=f"tokens in the cache (default: {CONTEXT})")
    options = parse(options, arguments, repeats=7)
    context = options.context or (64 if options.quick else CONTEXT)
    # generating code takes half a minute: quick, the graph runs as it was traced
    backend = "eager" if options.quick else "inductor"
    with tempfile.TemporaryDirectory() as folder:
        path = bench_checkpoint(Path(folder, "model"), options.quick)
        # float32: the sides add in other orders, which in bfloat16 would choose other tokens
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    times, first, tokens = measure(model, context, options.repeats, backend)
    names = list(SIDES)
    base = times["static, not compiled"]
    rows = [[name, times[name] * 1e3, base / times[name], first[name]] for name in names]
    compiled = min(times[name] for name in names if SIDES[name][2])
    setting = (
        f"{model.num_parameters() / 1e6:.0f}M parameters, {model.config.num_hidden_layers} layers; batch 1, float32, "
        f"{context} tokens of context, backend {backend}; median of {options.repeats} times {TOKENS} tokens."
    )
    bars = [
        Bar("same tokens on all sides", float(all(chosen == tokens[names[0]] for chosen in tokens.values())), 1),
        Bar("times faster than the uncompiled static step", None if options.quick else base / compiled, 1.0),
    ]
    headings = ["side", "ms per token", "times faster than static", f"seconds of the first {TOKENS} tokens"]
    return finish(options.json, setting, headings, rows, bars)


if __name__ == "__main__":
    sys.exit(main())
