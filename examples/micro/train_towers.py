"""Teaches MiMo-Micro's towers to see and to hear before the language model learns to speak of it.

    python examples/micro/train_towers.py runs/untrained runs/towers

The releases, too, began with a trained vision tower. A linear layer reads shape, colour and place off each token of a
picture, and note, word or glide off each token of a sound; it is thrown away at the end, answers in words come later.
Seven minutes on one CPU core.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor

import modeling_mimo  # noqa: F401 registers the model
from modeling_mimo.training.micro_pictures import CELL, COLOURS, SHAPES, background, draw, thing
from modeling_mimo.training.micro_sounds import NOTES, RATE, WORDS, glide, note, word


BATCH, LEARNING_RATE, WARMUP = 48, 2e-3, 40
CELLS = 9
# answers to each question about a cell: nothing or a shape, nothing or a colour, its place
SIGHT = (1 + len(SHAPES), 1 + len(COLOURS), CELLS)
# what a token of a sound is part of: a note, a word, a tone that falls or rises
HEARD = (*NOTES, *WORDS, False, True)


def board(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture [96, 96, 3] uint8 of one to five things, and the answers for each of its cells [9, 3]."""
    cells = random.choice(CELLS, random.integers(1, 6), replace=False)
    things = [thing(random, int(cell)) for cell in cells]
    answers = np.zeros((CELLS, len(SIGHT)), np.int64)
    answers[:, 2] = np.arange(CELLS)
    for one in things:
        cell = int(one.y // CELL) * 3 + int(one.x // CELL)
        answers[cell, :2] = 1 + SHAPES.index(one.shape), 1 + list(COLOURS).index(one.colour)
    return draw(things, background(random)), answers


def sound(random: np.random.Generator) -> tuple[np.ndarray, int]:
    """A sound [samples] and its place in HEARD."""
    kind = int(random.integers(len(HEARD)))
    if kind < len(NOTES):
        return note(random, HEARD[kind]), kind
    if kind < len(NOTES) + len(WORDS):
        return word(random, HEARD[kind], held_out=False), kind
    return glide(random, HEARD[kind], 1.0), kind


def see(model, processor, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [N, hidden] of new pictures, answers [N, 3], and which of them count as right or wrong [N]."""
    pictures, answers = zip(*(board(random) for _ in range(BATCH)))
    inputs = processor.image_processor(list(pictures), return_tensors="pt")
    answers = torch.from_numpy(np.concatenate(answers))
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    return torch.cat(list(features)), answers, answers[:, 0] > 0


def hear(model, processor, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `see`, of new sounds, answers [N, 1]."""
    sounds, kinds = zip(*(sound(random) for _ in range(BATCH)))
    codes = processor.get_audio_codes([(samples, RATE) for samples in sounds])
    lengths = torch.tensor([len(one) for one in codes])
    features = list(model.get_audio_features(torch.cat(codes), lengths).pooler_output)
    answers = torch.tensor(kinds).repeat_interleave(torch.tensor([len(tokens) for tokens in features]))
    return torch.cat(features), answers[:, None], torch.ones_like(answers, dtype=torch.bool)


def train(perceive: Callable, classes: tuple[int, ...], parameters: list, width: int, steps: int) -> list[float]:
    """Share of the tokens of which each question was answered right, in the last 20 steps."""
    reader = nn.Linear(width, sum(classes))
    parameters = [*parameters, *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - 0.95 * step / steps)
    )
    right = []
    with tqdm(range(steps), disable=None) as bar:
        for _ in bar:
            tokens, answers, counts = perceive()
            guesses = reader(F.rms_norm(tokens, tokens.shape[-1:])).split(classes, dim=1)
            loss = sum(F.cross_entropy(guess, answers[:, question]) for question, guess in enumerate(guesses))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            found = torch.stack([guess.argmax(1) for guess in guesses], dim=1) == answers
            right.append(found[counts].float().mean(0))
            shares = torch.stack(right[-20:]).mean(0).tolist()
            bar.set_postfix_str(", ".join(f"{share:.2f}" for share in shares))
    return shares


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that build.py wrote")
    parser.add_argument("folder", type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=700, help="of each tower (default: 700)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"folder: expected one that does not exist, got {args.folder}")
    torch.manual_seed(args.seed)
    random = np.random.default_rng([args.seed, 2])
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.source)
    ears = [*model.audio_encoder.parameters(), *model.speech_embeddings.parameters()]
    towers = (
        ("picture: shape, colour, place", see, SIGHT, list(model.visual.parameters())),
        ("sound", hear, (len(HEARD),), ears),
    )
    for what, perceive, classes, parameters in towers:
        batches = partial(perceive, model, processor, random)
        shares = train(batches, classes, parameters, model.config.hidden_size, args.steps)
        print(f"tokens read right of a {what}: {', '.join(f'{share:.1%}' for share in shares)}", flush=True)
    shutil.copytree(args.source, args.folder, ignore=shutil.ignore_patterns("model*.safetensors*"))
    # the codec's file has the same name
    shutil.copytree(args.source / "audio_tokenizer", args.folder / "audio_tokenizer", dirs_exist_ok=True)
    model.save_pretrained(args.folder)
    shutil.copy(args.source / "config.json", args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
