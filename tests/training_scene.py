"""What the tests of training share: a small omni checkpoint with a tokenizer, conversations with media, a model."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


MEDIA = Path(__file__).resolve().parents[1] / "examples" / "media"
IMAGE = {"type": "image", "path": str(MEDIA / "chart.png"), "max_pixels": 20000}
SOUND = {"type": "audio", "path": str(MEDIA / "speech.wav"), "end": 1}
VIDEO = {"type": "video", "path": str(MEDIA / "clip_with_sound.mp4"), "max_pixels": 20000, "num_frames": 4}

# the fewest layers and experts that keep both kinds of attention and a choice of experts
SMALL = {
    "num_hidden_layers": 3,
    "hybrid_layer_pattern": [0, 1, 0],
    "moe_layer_freq": [0, 1, 1],
}


def turns(part, answer: str, **extra) -> list[dict]:
    content = [part, {"type": "text", "text": "What is this?"}] if isinstance(part, dict) else part
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer, **extra}]


def conversations() -> list[dict]:
    """An image with reasoning, a sound, a video with sound, text."""
    return [
        {"messages": turns(IMAGE, "A chart.", reasoning_content="Bars.")},
        {"messages": turns(SOUND, "Words.")},
        {"messages": turns(VIDEO, "A clip.")},
        {"messages": turns("Hello", "Hi.")},
    ]


def write_checkpoint(folder) -> Path:
    return write_random_checkpoint(folder, "tiny", overrides=SMALL, vision=True, audio=True)


def load(folder, dtype=torch.float32, dequantize=True, **config):
    """A model of `write_checkpoint`; `config` are settings of its config."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=MiMoV2FP8Config(dequantize=dequantize)
    )
    for name, value in config.items():
        setattr(model.config, name, value)
    return model
