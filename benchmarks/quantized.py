"""What quantization costs: loss, distribution, best token and drafts of a small model trained on real text.

    python benchmarks/quantized.py --steps 900

The model of mtp.py is trained on the source text of Python's standard library, converted to bf16 and to FP8, and
loaded in each form; each is asked about modules that training has not seen. Random weights would say little: their
distributions are nearly flat.
"""

import sys
import tempfile
from pathlib import Path

import torch
from common import Bar, finish, interleaved, parse, parser, progress
from mtp import add_steps, generate, library_text, prompts_of, steps_of, trained_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert
from modeling_mimo.conversion.small_tokenizer import build_small_tokenizer


LENGTH = 128
# nats per token above bf16
LIMITS = {"FP8, kept": 0.02, "int8": 0.02, "nf4": 0.1}


def four_bit(quant_type: str, double: bool = False, **settings) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **settings,
    )


# name -> files, quantization while loading; the first one is what the others are compared with
FORMS = {
    "bf16": ("bf16", None),
    "FP8, kept": ("fp8", MiMoV2FP8Config(dequantize=False)),
    "int8": ("bf16", BitsAndBytesConfig(load_in_8bit=True)),
    "nf4": ("bf16", four_bit("nf4")),
    "nf4, double quant": ("bf16", four_bit("nf4", True)),
    "nf4 of FP8 files": ("fp8", four_bit("nf4")),
    "nf4, experts alone": ("bf16", four_bit("nf4", llm_int8_skip_modules=["self_attn", "mtp", "model.layers.0"])),
    "fp4": ("bf16", four_bit("fp4")),
}


def written(model, folder: Path) -> dict[str, Path]:
    """Folders of the model in bf16 and in FP8."""
    model.save_pretrained(folder / "float32")
    convert(folder / "float32", folder / "bf16", dtype="bf16", progress=False)
    # what FP8 leaves as it is stays bf16, as in the releases
    convert(folder / "bf16", folder / "fp8", dtype="fp8", progress=False)
    return {dtype: folder / dtype for dtype in ("bf16", "fp8")}


@torch.inference_mode()
def log_chances(model, windows: torch.Tensor) -> torch.Tensor:
    """[windows, LENGTH - 1, vocabulary] log-probabilities of the next token."""
    return torch.cat([model(part).logits[:, :-1].float().log_softmax(-1) for part in windows.split(8)])


def quality(chances: torch.Tensor, reference: torch.Tensor, windows: torch.Tensor) -> tuple[float, float, float]:
    """Nats per token of the text, KL divergence from the reference in nats, and how often the best tokens agree."""
    loss = -chances.gather(-1, windows[:, 1:, None]).mean()
    divergence = (reference.exp() * (reference - chances)).sum(-1).mean()
    agreement = (chances.argmax(-1) == reference.argmax(-1)).float().mean()
    return loss.item(), divergence.item(), agreement.item()


def expert_bits(model) -> float:
    """Bits per weight of the experts of a layer, scales included."""
    experts = model.model.layers[-1].mlp.experts
    weights = 3 * experts.num_experts * experts.hidden_dim * experts.intermediate_dim
    return 8 * sum(parameter.nbytes for parameter in experts.parameters()) / weights


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("Quality, memory and speed of quantized models.", "quantized.py --steps 900")
    add_steps(options)
    options = parse(options, arguments, repeats=3)
    steps = steps_of(options)
    count, tokens = (8, 8) if options.quick else (128, 64)
    known, unknown = library_text(build_small_tokenizer(2048), options.quick)
    model = trained_model(known, steps, options.quick)
    starts = torch.arange(count) * ((len(unknown) - LENGTH) // count)
    windows = torch.stack([unknown[start : start + LENGTH] for start in starts.tolist()])
    prompts = prompts_of(unknown, 4)
    with tempfile.TemporaryDirectory() as folder:
        folders = written(model, Path(folder))
        models = {}
        for name, (files, quantization) in FORMS.items():
            progress(f"loading {name}")
            models[name] = AutoModelForCausalLM.from_pretrained(folders[files], quantization_config=quantization)
    reference = log_chances(models["bf16"], windows)
    times = interleaved(
        {name: lambda model=model: generate(model, prompts[:1], tokens) for name, model in models.items()},
        options.repeats,
    )
    rows, bars = [], []
    for name, model in models.items():
        progress(f"quality of {name}")
        loss, divergence, agreement = quality(log_chances(model, windows), reference, windows)
        drafts = [generate(model, prompt[None], tokens, 3).mtp_stats for prompt in prompts]
        length = sum(stats.tokens for stats in drafts) / sum(sum(stats.steps) for stats in drafts)
        base = rows[0][1] if rows else loss
        memory = model.get_memory_footprint() / models["bf16"].get_memory_footprint()
        speed = times["bf16"] / times[name]
        rows.append(
            [name, loss, f"{loss - base:+.4f}", divergence, agreement, length, expert_bits(model), memory, speed]
        )
        if name in LIMITS:
            bars.append(Bar(f"loss of {name} above bf16, nats per token", loss - base, LIMITS[name], at_least=False))
    setting = (
        f"{models['bf16'].num_parameters() / 1e6:.1f}M parameters, {model.config.num_hidden_layers} layers, 2 of 8 "
        f"experts; trained for {steps} steps on the standard library of Python. Loss, KL divergence from bf16 and "
        f"agreement of the best token over {count} x {LENGTH} tokens of unseen modules; drafting: tokens per step "
        f"with 3 drafts; speed: {tokens} greedy tokens at batch 1, median of {options.repeats}. "
        "Embeddings and head, which stay bf16, are a larger share of the memory here than of a released model."
    )
    headings = [
        "weights",
        "loss",
        "above bf16",
        "KL, nats",
        "same best token",
        "tokens per step",
        "bits per expert weight",
        "memory of bf16",
        "speed of bf16",
    ]
    return finish(options.json, setting, headings, rows, bars)


if __name__ == "__main__":
    sys.exit(main())
