"""The audio parts of small random checkpoints: entry of config.json, tensor shapes, and the `audio_tokenizer/` folder.

Source of every key and value that is not a size: config.json and audio_tokenizer/config.json of XiaomiMiMo/MiMo-V2.5,
and the header of XiaomiMiMo/MiMo-V2.6-Flash-RL's audio_tokenizer/model.safetensors for the decoder.
"""

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from .random_common import new_folder, random_tensor, write_json


# an attention as wide as the hidden size, as released
_AUDIO = {
    "tiny": {
        "input_local_attn_heads": 2,
        "input_local_dim": 32,
        "input_local_head_dim": 16,
        "input_local_intermediate_size": 48,
        "input_local_layers": 2,
    },
    "demo": {
        "input_local_attn_heads": 4,
        "input_local_dim": 64,
        "input_local_head_dim": 16,
        "input_local_intermediate_size": 192,
        "input_local_layers": 3,
    },
}
_AUDIO["bench"] = _AUDIO["demo"]

# tiny: a window of 8 positions, 0.16 s. full: the released sizes, 308M parameters and a file of 653 MB
AUDIO_TOKENIZER_SIZES = {
    "tiny": {"d_model": 64, "layers": 4, "attention_heads": 4, "ffn_dim": 160, "attn_window_size": [8, 0]},
    "demo": {"d_model": 128, "layers": 6, "attention_heads": 4, "ffn_dim": 384, "attn_window_size": [128, 0]},
    "full": {"d_model": 1024, "layers": 24, "attention_heads": 16, "ffn_dim": 4096, "attn_window_size": [128, 0]},
}
AUDIO_TOKENIZER_SIZES["bench"] = AUDIO_TOKENIZER_SIZES["demo"]

# Log-mel values lie around -8 and the output of GELU is mostly positive. Weights that sum to 0 over their input leave
# that out; without, it outweighs what differs between frames, and most frames have the same codes.
_CENTRED = ("conv1.weight", "conv2.weight", "fc2.weight", "down_sample_layer.0.weight")


def audio_config(size: str, out_hidden_size: int) -> dict:
    """The entry `audio_config` of config.json, in the released key order; two of its numbers are strings there."""
    sizes = _AUDIO[size]
    return {
        "add_post_norm": True,
        "audio_channels": 20,
        "audio_segment_size": 6000,
        "group_size": 4,
        "input_full_attention": True,
        "input_local_attn_heads": sizes["input_local_attn_heads"],
        "input_local_dim": sizes["input_local_dim"],
        "input_local_head_dim": sizes["input_local_head_dim"],
        "input_local_hidden_dropout": 0.0,
        "input_local_intermediate_size": sizes["input_local_intermediate_size"],
        "input_local_layers": sizes["input_local_layers"],
        "out_hidden_size": out_hidden_size,
        "partial_rotary_factor": 1.0,
        "projection_layers": 2,
        "rope_theta": 640000,
        "speech_vocab_size": "1280",
        "speech_zeroemb_idx": "1024",
    }


def audio_shapes(audio: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every audio tensor of the language model's files, in the order of the forward pass."""
    hidden, inner = audio["input_local_dim"], audio["input_local_intermediate_size"]
    width = audio["input_local_attn_heads"] * audio["input_local_head_dim"]
    for channel in range(audio["audio_channels"]):
        yield f"speech_embeddings.{channel}.weight", (int(audio["speech_vocab_size"]), hidden)
    for layer in range(audio["input_local_layers"]):
        prefix = f"audio_encoder.input_local_transformer.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{prefix}self_attn.{name}.weight", (width, hidden)
            yield f"{prefix}self_attn.{name}.bias", (width,)
        yield prefix + "self_attn.o_proj.weight", (hidden, width)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "audio_encoder.input_local_transformer.norm.weight", (hidden,)
    group = audio["group_size"] * hidden
    yield "audio_encoder.projection.mlp.0.weight", (4 * group, group)
    yield "audio_encoder.projection.mlp.2.weight", (audio["out_hidden_size"], 4 * group)


def audio_tokenizer_config(size: str = "tiny", overrides: dict | None = None) -> dict:
    """The contents of audio_tokenizer/config.json with the sizes of AUDIO_TOKENIZER_SIZES[size].

    overrides: keys to set or add last, by their released spelling; they must fit together.
    ValueError: unknown size; overrides that contradict each other.
    """
    if size not in AUDIO_TOKENIZER_SIZES:
        raise ValueError(f"size is {size!r}, expected one of {', '.join(AUDIO_TOKENIZER_SIZES)}")
    sizes = copy.deepcopy(AUDIO_TOKENIZER_SIZES[size])
    config = {
        "max_audio_seconds": 300,
        "stride_size": 2,
        "avg_pooler": 2,
        "d_model": sizes["d_model"],
        "scale_embedding": False,
        "kernel_size": 3,
        "activation_function": "gelu",
        "encoder_layers": sizes["layers"],
        "encoder_skip_layer_id": 3,
        "encoder_attention_heads": sizes["attention_heads"],
        "encoder_ffn_dim": sizes["ffn_dim"],
        "encoder_causal": True,
        "encoder_attn_window_size": sizes["attn_window_size"],
        "decoder_layers": sizes["layers"],
        "decoder_attention_heads": sizes["attention_heads"],
        "decoder_ffn_dim": sizes["ffn_dim"],
        "decoder_kernel_size": 3,
        "decoder_stride_size": 2,
        "decoder_causal": True,
        "decoder_attn_window_size": list(sizes["attn_window_size"]),
        "nfft": 960,
        "n_mels": 128,
        "sampling_rate": 24000,
        "hop_length": 240,
        "window_size": 960,
        "vocoder_padding": "same",
        "fmin": 0,
        "fmax": None,
        "num_quantizers": 20,
        "codebook_size": [1024, 1024, 256] + [128] * 17,
        "threshold_ema_dead_code": 2,
        "position_embedding_type": "rope",
        "rope_theta": 10000,
        "rope_type": "default",
        "ln_type": "LayerNorm",
        "use_istft_only": True,
        "hybrid_attention": True,
        "hybrid_block_size": 8,
        "swa_per_block": 2,
    }
    config.update(overrides or {})
    if len(config["codebook_size"]) != config["num_quantizers"]:
        raise ValueError(
            f"codebook_size has {len(config['codebook_size'])} entries, "
            f"expected num_quantizers = {config['num_quantizers']}"
        )
    if config["d_model"] % (2 * config["encoder_attention_heads"]):
        raise ValueError(
            f"d_model is {config['d_model']}, "
            f"expected a multiple of 2 * encoder_attention_heads = {2 * config['encoder_attention_heads']}"
        )
    return config


def audio_tokenizer_tensors_random(config: dict, seed: int = 0, decoder: bool = False) -> dict[str, torch.Tensor]:
    """Random values of every tensor of an audio tokenizer: codebooks and decoder are float32, the rest is bfloat16.

    config: as `audio_tokenizer_config` returns it. decoder: with the tensors that V2.6 has and V2.5 has not.
    """
    tensors = {}
    for name, shape in encoder_shapes(config):
        tensors[name] = random_tensor(name, shape, seed)
        if name.endswith(_CENTRED):
            tensors[name] -= tensors[name].mean(tuple(range(1, len(shape))), keepdim=True)
    tensors |= _codebooks(config, seed)
    if decoder:
        tensors |= {name: random_tensor(name, shape, seed, torch.float32) for name, shape in decoder_shapes(config)}
    return tensors


def write_random_audio_tokenizer(
    folder: str | os.PathLike,
    size: str = "tiny",
    seed: int = 0,
    decoder: bool = False,
    overrides: dict | None = None,
) -> Path:
    """Write a random `audio_tokenizer/` folder in the released format; return it. The same arguments, the same bytes.

    size: a key of AUDIO_TOKENIZER_SIZES; "full" are the released sizes. decoder, overrides: as above.

    Files are written to `<folder>.partial`, which is renamed at the end.
    ValueError: `folder` exists and is not an empty folder, `<folder>.partial` exists, or arguments as above.
    """
    config = audio_tokenizer_config(size, overrides)
    tensors = audio_tokenizer_tensors_random(config, seed, decoder)
    with new_folder(folder) as partial:
        write_json(partial / "config.json", config)
        # Written from the tensors' own memory: "full" takes no second copy. Without metadata the library writes no
        # `__metadata__`, as released.
        save_file(tensors, partial / "model.safetensors")
        # the library lets only the owner read
        (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)
    return Path(folder)


def encoder_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the encoder's tensors without the codebooks."""
    hidden, kernel, pool = config["d_model"], config["kernel_size"], config["avg_pooler"]
    yield from _affine("encoder.conv1", (hidden, config["n_mels"], kernel))
    yield from _affine("encoder.conv2", (hidden, hidden, kernel))
    for layer in range(config["encoder_layers"]):
        yield from _layer_shapes(f"encoder.layers.{layer}.", hidden, config["encoder_ffn_dim"])
    yield from _affine("encoder.layer_norm", (hidden,))
    yield "encoder.down_sample_layer.0.weight", (hidden, hidden, pool)
    yield from _affine("encoder.down_sample_norm", (hidden,))


def decoder_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the decoder's tensors; the buffers of three mel losses are among them."""
    hidden, mels, nfft = config["d_model"], config["n_mels"], config["nfft"]
    for name, out, kernel in (
        ("dconv1", hidden, config["avg_pooler"]),
        ("dconv2", mels, config["decoder_kernel_size"]),
    ):
        # transposed convolutions: the input channels come first, and the bias belongs to the second number
        yield f"decoder.{name}.conv.weight", (hidden, out, kernel)
        yield f"decoder.{name}.conv.bias", (out,)
        yield from _affine(f"decoder.{name}.norm", (out,))
    for layer in range(config["decoder_layers"]):
        yield from _layer_shapes(f"decoder.layers.{layer}.", hidden, config["decoder_ffn_dim"])
    yield from _affine("decoder.layer_norm", (hidden,))
    yield from _affine("decoder.vocoder.out", (nfft + 2, mels))
    yield "decoder.vocoder.istft.window", (config["window_size"],)
    for index in range(3):
        prefix = f"decoder.mel_loss_fn.mel_transforms.{index}."
        yield prefix + "mel_scale.fb", ((nfft >> index) // 2 + 1, mels >> index)
        yield prefix + "spectrogram.window", (config["window_size"] >> index,)


def _affine(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name + ".weight", shape
    yield name + ".bias", shape[:1]


def _layer_shapes(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _affine(prefix + "self_attn_layer_norm", (hidden,))
    yield from _affine(prefix + "self_attn.q_proj", (hidden, hidden))
    yield prefix + "self_attn.k_proj.weight", (hidden, hidden)
    yield from _affine(prefix + "self_attn.v_proj", (hidden, hidden))
    yield from _affine(prefix + "self_attn.out_proj", (hidden, hidden))
    yield from _affine(prefix + "final_layer_norm", (hidden,))
    yield from _affine(prefix + "fc1", (inner, hidden))
    yield from _affine(prefix + "fc2", (hidden, inner))


def _codebooks(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """The buffers of each level, float32; only `embed` is read, so that the others may be anything.

    What is quantized has a variance of 1 per dimension. The nearest of k random entries explains most where their
    variance is 2 ln k / dimensions of the residual's, and it explains that share of it: each level is as much smaller.
    """
    tensors, variance, hidden = {}, 1.0, config["d_model"]
    for level, entries in enumerate(config["codebook_size"]):
        prefix = f"encoder.quantizer.vq.layers.{level}._codebook."
        share = min(0.5, 2 * math.log(max(entries, 2)) / hidden)
        scale = (variance * share * hidden) ** 0.5
        for name in ("embed", "embed_avg"):
            tensors[prefix + name] = random_tensor(prefix + name, (entries, hidden), seed, torch.float32) * scale
        tensors[prefix + "cluster_size"] = random_tensor(prefix + "size", (entries,), seed, torch.float32).exp()
        tensors[prefix + "inited"] = torch.ones(1)
        variance *= 1 - share
    return tensors
