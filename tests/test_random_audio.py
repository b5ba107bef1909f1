"""Audio parts of random checkpoints have the released names, shapes, dtypes and settings, and codes that vary."""

import gzip
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import modeling_mimo
from modeling_mimo.conversion import random_audio
from modeling_mimo.conversion.random_audio import (
    audio_shapes,
    audio_tokenizer_config,
    decoder_shapes,
    encoder_shapes,
    write_random_audio_tokenizer,
)
from modeling_mimo.conversion.random_checkpoint import main, released_config, write_random_checkpoint
from modeling_mimo.processors import MiMoAudioTokenizer


SHIPPED = Path(modeling_mimo.__file__).parent / "data" / "MiMo-V2.5"
AUDIO_PREFIXES = ("audio_encoder.", "speech_embeddings.")

# audio_tokenizer/ of MiMo-V2.5: sha256 of config.json, tensors, bfloat16 elements, bytes of all tensors
CONFIG_SHA256 = "e0702ada"
TENSORS, ELEMENTS, BYTES = 449, 307_927_040, 652_572_240
# and what V2.6's file has more: tensors, float32 elements
DECODER_TENSORS, DECODER_ELEMENTS = 379, 304_988_274

# the released names of a layer, in encoder and decoder alike; k_proj has no bias
LAYER_MODULES = [f"self_attn.{part}_proj" for part in ("q", "v", "out")]
LAYER_MODULES += ["self_attn_layer_norm", "final_layer_norm", "fc1", "fc2"]
LAYER = [f"{name}.{kind}" for name in LAYER_MODULES for kind in ("weight", "bias")] + ["self_attn.k_proj.weight"]
ENCODER = [
    f"{name}.{kind}" for name in ("conv1", "conv2", "layer_norm", "down_sample_norm") for kind in ("weight", "bias")
]
ENCODER += ["down_sample_layer.0.weight"]
DECODER = [
    f"{name}.{kind}"
    for name in ("dconv1.conv", "dconv1.norm", "dconv2.conv", "dconv2.norm", "layer_norm", "vocoder.out")
    for kind in ("weight", "bias")
] + ["vocoder.istft.window"]
DECODER += [
    f"mel_loss_fn.mel_transforms.{i}.{kind}" for i in range(3) for kind in ("mel_scale.fb", "spectrogram.window")
]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def header(path):
    """name -> (dtype as in the file, shape)."""
    with safe_open(path, framework="pt") as file:
        assert file.metadata() is None
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def headers(folder):
    return {name: entry for path in folder.glob("*.safetensors") for name, entry in header(path).items()}


def released_rows():
    """name -> (dtype, shape) of the audio tensors in the released model's files."""
    lines = gzip.decompress((SHIPPED / "tensor_manifest.tsv.gz").read_bytes()).decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.startswith(AUDIO_PREFIXES)]
    return {name: (dtype, tuple(map(int, shape.split("x")))) for name, dtype, shape, _ in rows}


def bytes_of(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("audio") / "hearing", vision=True, audio=True)


@pytest.fixture(scope="module")
def tokenizer_folder(hearing):
    return hearing / "audio_tokenizer"


# Inside the language model's files --------------------------------------------------------------------------------


def test_audio_tensors_at_the_released_sizes_are_the_released_ones():
    shapes = dict(audio_shapes(read_json(SHIPPED / "config.json")["audio_config"]))
    rows = released_rows()
    assert len(rows) == 95
    assert shapes == {name: shape for name, (_, shape) in rows.items()}


def test_audio_tensors_are_written_in_bfloat16_beside_the_other_non_expert_tensors(hearing):
    shapes = dict(audio_shapes(read_json(hearing / "config.json")["audio_config"]))
    got = {name: entry for name, entry in headers(hearing).items() if name.startswith(AUDIO_PREFIXES)}
    assert got == {name: ("BF16", shape) for name, shape in shapes.items()}
    weight_map = read_json(hearing / "model.safetensors.index.json")["weight_map"]
    assert {weight_map[name] for name in got} == {"model_pp0_ep0_shard1.safetensors"}


def test_audio_settings_are_the_released_ones(hearing):
    config, shipped = read_json(hearing / "config.json"), read_json(SHIPPED / "config.json")
    assert list(config) == list(shipped)
    audio = config["audio_config"]
    assert list(audio) == list(shipped["audio_config"])
    assert audio["out_hidden_size"] == config["hidden_size"]
    for key, value in shipped["audio_config"].items():
        if not key.startswith("input_local_") and key != "out_hidden_size":
            assert audio[key] == value
    assert config["processor_config"]["audio_token_id"] == 151669 - 151675 + 2048


def test_text_and_vision_are_the_same_without_ears(hearing, tmp_path):
    deaf = write_random_checkpoint(tmp_path / "deaf", vision=True, with_tokenizer=False)
    name = "model_pp0_ep0_shard1.safetensors"
    less, more = load_file(deaf / name), load_file(hearing / name)
    assert set(more) - set(less) == set(dict(audio_shapes(read_json(hearing / "config.json")["audio_config"])))
    assert all(torch.equal(less[name].view(torch.uint8), more[name].view(torch.uint8)) for name in less)
    assert "audio_config" not in read_json(deaf / "config.json")
    assert not (deaf / "audio_tokenizer").exists()


def test_ears_need_eyes():
    with pytest.raises(ValueError, match="audio is True, expected vision too"):
        released_config(audio=True)


def test_same_arguments_same_bytes(hearing, tmp_path):
    assert bytes_of(write_random_checkpoint(tmp_path / "again", vision=True, audio=True)) == bytes_of(hearing)
    other = write_random_audio_tokenizer(tmp_path / "other", seed=1)
    assert bytes_of(other).keys() == bytes_of(hearing / "audio_tokenizer").keys()
    assert not set(header(other / "model.safetensors")) ^ set(
        header(hearing / "audio_tokenizer" / "model.safetensors")
    )
    assert bytes_of(other) != bytes_of(hearing / "audio_tokenizer")


def test_command_line(tmp_path, capsys):
    assert main([str(tmp_path / "x"), "--vision", "--audio", "--no-tokenizer"]) == 0
    assert "11 files" in capsys.readouterr().out
    assert main([str(tmp_path / "y"), "--audio"]) == 1
    assert capsys.readouterr().err.startswith("error: audio is True")


# The folder audio_tokenizer/ --------------------------------------------------------------------------------------


def test_the_full_config_is_the_released_file():
    text = json.dumps(audio_tokenizer_config("full"), indent=2)
    assert hashlib.sha256(text.encode()).hexdigest().startswith(CONFIG_SHA256)


def expected_names(config, decoder):
    names = [f"encoder.{name}" for name in ENCODER]
    names += [f"encoder.layers.{layer}.{name}" for layer in range(config["encoder_layers"]) for name in LAYER]
    names += [
        f"encoder.quantizer.vq.layers.{level}._codebook.{buffer}"
        for level in range(config["num_quantizers"])
        for buffer in ("embed", "embed_avg", "cluster_size", "inited")
    ]
    if decoder:
        names += [f"decoder.{name}" for name in DECODER]
        names += [f"decoder.layers.{layer}.{name}" for layer in range(config["decoder_layers"]) for name in LAYER]
    return set(names)


@pytest.mark.parametrize("decoder", [False, True])
def test_audio_tokenizer_tensors_are_the_released_ones(tmp_path, decoder):
    folder = write_random_audio_tokenizer(tmp_path / "x", decoder=decoder)
    config, entries = read_json(folder / "config.json"), header(folder / "model.safetensors")
    assert list(config) == list(audio_tokenizer_config("full"))
    assert set(entries) == expected_names(config, decoder)
    for name, (dtype, shape) in entries.items():
        if "_codebook." not in name:
            assert dtype == ("F32" if name.startswith("decoder.") else "BF16")
            continue
        *_, level, _, buffer = name.split(".")
        size, width = config["codebook_size"][int(level)], config["d_model"]
        shapes = {"embed": (size, width), "embed_avg": (size, width), "cluster_size": (size,), "inited": (1,)}
        assert (dtype, shape) == ("F32", shapes[buffer])
    # the mode of any file: the library alone would let nobody but the owner read
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_audio_tokenizer_element_counts_at_the_released_sizes():
    config = audio_tokenizer_config("full")
    encoder, decoder = dict(encoder_shapes(config)), dict(decoder_shapes(config))
    assert len(encoder) + 4 * config["num_quantizers"] == TENSORS == len(expected_names(config, False))
    elements = sum(map(math.prod, encoder.values()))
    entries = sum(config["codebook_size"])
    codebooks = entries * (2 * config["d_model"] + 1) + config["num_quantizers"]
    assert (elements, 2 * elements + 4 * codebooks) == (ELEMENTS, BYTES)
    assert (len(decoder), sum(map(math.prod, decoder.values()))) == (DECODER_TENSORS, DECODER_ELEMENTS)
    # one of each kind that no other line fixes
    assert encoder["encoder.conv1.weight"] == (1024, 128, 3)
    assert encoder["encoder.down_sample_layer.0.weight"] == (1024, 1024, 2)
    assert encoder["encoder.layers.23.fc1.weight"] == (4096, 1024)
    assert decoder["decoder.dconv2.conv.weight"] == (1024, 128, 3)
    assert decoder["decoder.vocoder.out.weight"] == (962, 128)
    assert decoder["decoder.mel_loss_fn.mel_transforms.2.mel_scale.fb"] == (121, 32)


def test_codes_vary_on_every_level(tokenizer_folder):
    tokenizer = MiMoAudioTokenizer.from_pretrained(tokenizer_folder)
    frames = 2 * torch.randn(1, 1600, 128) - 8
    codes = tokenizer.encode(frames).audio_codes
    assert codes.shape == (400, 20)
    assert min(len(set(level)) for level in codes.T.tolist()) > 90
    # and what a level leaves to the next one gets smaller
    entries = load_file(tokenizer_folder / "model.safetensors")
    deviations = [entries[f"encoder.quantizer.vq.layers.{level}._codebook.embed"].std() for level in range(3, 20)]
    assert deviations == sorted(deviations, reverse=True)


def test_overrides(tmp_path):
    changes = {"encoder_layers": 3, "num_quantizers": 2, "codebook_size": [16, 8], "encoder_attn_window_size": [4, 0]}
    folder = write_random_audio_tokenizer(tmp_path / "x", overrides=changes)
    config, entries = read_json(folder / "config.json"), header(folder / "model.safetensors")
    assert {key: config[key] for key in changes} == changes
    assert set(entries) == expected_names(config, decoder=False)
    assert entries["encoder.quantizer.vq.layers.1._codebook.embed"] == ("F32", (8, 64))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="size is 'huge', expected one of tiny, demo, full, bench"):
        audio_tokenizer_config("huge")
    with pytest.raises(ValueError, match="codebook_size has 20 entries, expected num_quantizers = 4"):
        audio_tokenizer_config(overrides={"num_quantizers": 4})
    with pytest.raises(ValueError, match=r"d_model is 12, expected a multiple of 2 \* encoder_attention_heads = 8"):
        audio_tokenizer_config(overrides={"d_model": 12})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a new or an empty folder"):
        write_random_audio_tokenizer(tmp_path)


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(random_audio, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_random_checkpoint(tmp_path / "x", vision=True, audio=True, with_tokenizer=False)
    assert not list(tmp_path.iterdir())
