"""Trains MiMo-Micro's audio tokenizer: an autoencoder of mel frames, then codebooks by residual k-means.

    python examples/micro/train_codec.py runs/codec

Writes a folder in the format of the released `audio_tokenizer/`. About four minutes on one CPU core; the same seed,
threads and versions give the same file.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from modeling_mimo.conversion.random_audio import audio_tokenizer_config
from modeling_mimo.processors import MiMoAudioTokenizer, MiMoAudioTokenizerConfig, MiMoV2FeatureExtractor
from modeling_mimo.training.micro_sounds import NOTES, RATE, WORDS, after_another, glide, note, word


CODEBOOKS = [512, 256, 128, 128, 128, 128, 128, 128]
SIZES = {
    "d_model": 96,
    "encoder_layers": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "encoder_attn_window_size": [16, 0],
    "num_quantizers": len(CODEBOOKS),
    "codebook_size": CODEBOOKS,
}
BATCH, RATE_OF_LEARNING, WARMUP = 16, 2e-3, 100
# latents that k-means sees, and rounds of it per level
LATENTS, ROUNDS = 40000, 12


def sound(random: np.random.Generator) -> np.ndarray:
    """[samples] of what the tasks are made of; words only in the voices that are not held out."""
    kind = random.integers(4)
    if kind == 0:
        return note(random, str(random.choice(list(NOTES))))
    if kind == 1:
        return word(random, str(random.choice(WORDS)), held_out=False)
    if kind == 2:
        return glide(random, bool(random.integers(2)), random.uniform(1, 3))
    return after_another(
        random, note(random, str(random.choice(list(NOTES)))), word(random, str(random.choice(WORDS)), False)
    )


class Listener:
    """Mel frames of random sounds, and the encoder's output ahead of its quantizer."""

    def __init__(self, tokenizer: MiMoAudioTokenizer, seed: int):
        self.encoder, self.random = tokenizer.encoder, np.random.default_rng([seed, 1])
        self.features = MiMoV2FeatureExtractor()
        self.latent = None
        tokenizer.encoder.down_sample_norm.register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        self.latent = output

    def batch(self, count: int = BATCH) -> list[torch.Tensor]:
        """[frames, 128] of each sound, cut to whole code frames."""
        sounds = [sound(self.random) for _ in range(count)]
        mels = self.features(sounds, sampling_rate=RATE, return_tensors="pt")
        lengths = mels["feature_lengths"].tolist()
        return [part[: length // 4 * 4] for part, length in zip(mels["input_features"], lengths)]

    def hear(self, mels: list[torch.Tensor]) -> torch.Tensor:
        """[code frames of all sounds, d_model]"""
        self.encoder(mels)
        return self.latent


def train_encoder(listener: Listener, width: int, steps: int) -> float:
    """Mean squared error of the mel frames told from their latents, over their variance, in the last 100 steps."""
    decoder = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 4 * 128))
    parameters = [*listener.encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE_OF_LEARNING, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - 0.95 * step / steps)
    )
    # log-mel values lie far from 0
    centre = torch.cat(listener.batch()).mean(0).repeat(4)
    losses = []
    with tqdm(range(steps), desc="autoencoder", disable=None) as bar:
        for _ in bar:
            mels = listener.batch()
            latent = listener.hear(mels)
            target = torch.cat(mels).reshape(-1, 4 * 128) - centre
            # the codebooks will not be exact: the decoder must bear some noise
            error = (decoder(latent + 0.1 * torch.randn_like(latent)) - target).pow(2).mean()
            loss = error / target.var()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
    return float(np.mean(losses[-100:]))


@torch.no_grad()
def train_codebooks(listener: Listener, levels: nn.ModuleList) -> list[float]:
    """Residual k-means of the latents; the share of their variance that is left behind each level."""
    parts, rows = [], 0
    while rows < LATENTS:
        parts.append(listener.hear(listener.batch()))
        rows += len(parts[-1])
    residual = torch.cat(parts)[:LATENTS]
    total, left = residual.var(0).sum(), []
    for level in tqdm(levels, desc="codebooks", disable=None):
        book = level._codebook
        entries, counts = kmeans(residual, len(book.embed))
        book.embed.copy_(entries)
        book.cluster_size.copy_(counts)
        book.embed_avg.copy_(entries * counts[:, None])
        # as the tokenizer will see them
        entries = book.entries()
        residual = residual - entries[nearest(residual, entries)]
        left.append((residual.var(0).sum() / total).item())
    return left


def kmeans(points: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[size, width] means and [size] points of each; a mean without points moves to a random point."""
    entries = points[torch.randperm(len(points))[:size]].clone()
    for _ in range(ROUNDS):
        chosen = nearest(points, entries)
        counts = torch.bincount(chosen, minlength=size).float()
        entries = torch.zeros_like(entries).index_add_(0, chosen, points) / counts.clamp(min=1)[:, None]
        empty = counts == 0
        entries[empty] = points[torch.randint(len(points), (int(empty.sum()),))]
    return entries, torch.bincount(nearest(points, entries), minlength=size).float()


def nearest(points: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cdist(part, entries).argmin(1) for part in points.split(4096)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=1500, help="steps of the autoencoder (default: 1500)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"folder: expected one that does not exist, got {args.folder}")
    torch.manual_seed(args.seed)
    config = audio_tokenizer_config("tiny", SIZES)
    tokenizer = MiMoAudioTokenizer(MiMoAudioTokenizerConfig.from_dict(config)).float()
    listener = Listener(tokenizer, args.seed)
    error = train_encoder(listener, config["d_model"], args.steps)
    left = train_codebooks(listener, tokenizer.encoder.quantizer.vq.layers)
    print(
        f"variance lost: {error:.3f} of the mel frames, "
        f"{left[0]:.3f} of the latents behind the first level, {left[-1]:.3f} behind the last"
    )
    args.folder.mkdir(parents=True)
    tensors = {
        name: tensor.contiguous() if "_codebook" in name else tensor.to(torch.bfloat16).contiguous()
        for name, tensor in tokenizer.state_dict().items()
    }
    save_file(tensors, args.folder / "model.safetensors")
    (args.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
