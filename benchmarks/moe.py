"""Arithmetic rate of MiMoV2Experts against the bare matrix products it consists of.

    python benchmarks/moe.py --hidden 4096 --intermediate 2048 --experts 32

The bound is what no implementation can avoid: for each expert that was hit, the three matrix products (gate, up,
down) on as many tokens as chose it, from inputs that lie ready. Routing, gathering, the activation and the weighted
sum come on top in the measured ones.
"""

import sys

import torch
import torch.nn.functional as F
from common import Bar, finish, interleaved, parse, parser

from modeling_mimo import MiMoV2Config
from modeling_mimo.modeling_mimo_v2_text import MiMoV2Experts


TOKENS = (1, 64, 512)
TOP_K = 8
BOUND = "three matrix products per hit expert"
OURS = "MiMoV2Experts"
GROUPED = "Transformers' grouped_mm"


def make_experts(hidden: int, intermediate: int, experts: int) -> MiMoV2Experts:
    config = MiMoV2Config(hidden_size=hidden, moe_intermediate_size=intermediate, n_routed_experts=experts)
    with torch.device("meta"):
        module = MiMoV2Experts(config)
    module = module.to(torch.bfloat16).to_empty(device="cpu").eval()
    for weight in module.parameters():
        weight.data.normal_(std=weight.shape[-1] ** -0.5)
    return module


def run_as(module: MiMoV2Experts, implementation: str, *inputs: torch.Tensor) -> torch.Tensor:
    module.config._experts_implementation = implementation
    return module(*inputs)


def matrix_products(module: MiMoV2Experts, parts: list[tuple]) -> None:
    for expert, states, activated in parts:
        gate, up = module.gate_up_proj[expert].chunk(2)
        F.linear(states, gate)
        F.linear(states, up)
        F.linear(activated, module.down_proj[expert])


@torch.inference_mode()
def measure(module: MiMoV2Experts, tokens: int, repeats: int) -> tuple[dict[str, float], float]:
    """Median seconds of each way, and the largest difference of our output from Transformers' over its spread."""
    states = torch.randn(tokens, module.hidden_dim, dtype=torch.bfloat16)
    indices = torch.rand(tokens, module.num_experts).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K)
    weights = weights / weights.sum(-1, keepdim=True)
    parts = [
        (
            expert,
            torch.randn(count, module.hidden_dim).bfloat16(),
            torch.randn(count, module.intermediate_dim).bfloat16(),
        )
        for expert, count in enumerate(indices.flatten().bincount().tolist())
        if count
    ]
    inputs = (states, indices, weights)
    ours, other = run_as(module, "eager", *inputs).float(), run_as(module, "grouped_mm", *inputs).float()
    functions = {
        BOUND: lambda: matrix_products(module, parts),
        OURS: lambda: run_as(module, "eager", *inputs),
        GROUPED: lambda: run_as(module, "grouped_mm", *inputs),
    }
    return interleaved(functions, repeats), ((ours - other).abs().max() / other.std()).item()


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("FLOP/s of the experts against bare matrix products.", "moe.py --experts 32 --repeats 21")
    options.add_argument("--hidden", type=int, default=None, help="hidden size (default: 2048)")
    options.add_argument("--intermediate", type=int, default=None, help="width of an expert (default: 1024)")
    options.add_argument("--experts", type=int, default=64)
    options = parse(options, arguments, repeats=11)
    hidden, intermediate = options.hidden or 2048, options.intermediate or 1024
    if options.quick:
        hidden, intermediate = options.hidden or 256, options.intermediate or 128
    torch.manual_seed(0)
    module = make_experts(hidden, intermediate, options.experts)
    rows, share, difference = [], {}, 0.0
    for tokens in TOKENS:
        times, apart = measure(module, tokens, options.repeats)
        flops = 6 * tokens * TOP_K * hidden * intermediate
        rows += [[tokens, way, took * 1e3, flops / took / 1e9, times[BOUND] / took] for way, took in times.items()]
        share[tokens], difference = times[BOUND] / times[OURS], max(difference, apart)
    setting = (
        f"hidden size {hidden}, {options.experts} experts of width {intermediate}, {TOP_K} per token chosen at "
        f"random; bf16; median of {options.repeats}."
    )
    bars = [
        Bar("largest difference from grouped_mm, in standard deviations", difference, 0.1, at_least=False),
        Bar("share of the bound's FLOP/s at 512 tokens", None if options.quick else share[512], 0.7),
    ]
    headings = ["tokens", "way", "ms", "GFLOP/s", "share of the bound"]
    return finish(options.json, setting, headings, rows, bars)


if __name__ == "__main__":
    sys.exit(main())
