"""The audio tokenizer: codes against a naive page, whatever is batched with what; its files, and what it refuses."""

import json
import shutil
from pathlib import Path

import audio_tokenizer_reference
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForAudioTokenization

from modeling_mimo.conversion.random_audio import write_random_audio_tokenizer
from modeling_mimo.processors import MiMoAudioTokenizer, MiMoAudioTokenizerConfig
from modeling_mimo.processors import modeling_mimo_audio_tokenizer as module


pytestmark = pytest.mark.usefixtures("one_thread")

RELEASED_CONFIG = Path(__file__).parent / "data" / "audio_tokenizer_config.json"
# around the window (16 mel frames), odd and even after each halving
LENGTHS = (1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 32, 33, 64, 101, 203)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_audio_tokenizer(tmp_path_factory.mktemp("audio") / "audio_tokenizer", "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return MiMoAudioTokenizer.from_pretrained(folder, dtype=torch.float32)


def mel(*lengths, seed=0, bins=128):
    """Log-mel frames of noise that grows louder and softer."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.linspace(0, 9, max(lengths)).sin()[:, None] * 3 - 4
    return [loudness[:n] + 2 * torch.randn(n, bins, generator=generator) for n in lengths]


def encode(tokenizer, segments):
    return list(tokenizer.encode_segments(segments))


def test_the_codes_are_those_of_the_naive_page(folder, tokenizer):
    tensors, segments = load_file(folder / "model.safetensors"), mel(*LENGTHS)
    distinct = set()
    for segment, codes in zip(segments, encode(tokenizer, segments), strict=True):
        expected = audio_tokenizer_reference.codes(tensors, tokenizer.config, segment)
        assert codes.tolist() == expected
        distinct.update(map(tuple, expected))
    # equal codes for everything would be equal to the page as well
    assert len(distinct) > 0.9 * sum(-(-n // 4) for n in LENGTHS)


def test_other_reference_settings_reach_the_codes(folder):
    tensors, segments = load_file(folder / "model.safetensors"), mel(120)
    found = []
    for dtype in ("bfloat16", "float32"):
        tokenizer = MiMoAudioTokenizer.from_pretrained(folder, dtype=torch.float32, reference_dtype=dtype)
        (codes,) = encode(tokenizer, segments)
        assert codes.tolist() == audio_tokenizer_reference.codes(tensors, tokenizer.config, segments[0])
        found.append(codes)
    assert not torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_batching_never_changes_a_code(folder, dtype):
    tokenizer = MiMoAudioTokenizer.from_pretrained(folder, dtype=dtype)
    lengths = [*LENGTHS, *range(1, 60), 400, 600]
    segments = mel(*lengths, seed=1)
    alone = [encode(tokenizer, [segment])[0] for segment in segments]
    order = torch.randperm(len(segments)).tolist()
    for batch in (range(len(segments)), order, order[:7], order[7:11]):
        together = encode(tokenizer, [segments[index] for index in batch])
        assert all(torch.equal(codes, alone[index]) for codes, index in zip(together, batch, strict=True))


def test_batching_never_changes_a_code_at_released_width():
    # products of the released size take other kernels than tiny ones
    torch.manual_seed(0)
    tokenizer = MiMoAudioTokenizer(MiMoAudioTokenizerConfig(num_hidden_layers=2, skip_layer_id=1)).eval()
    segments = mel(1, 9, 30, 64, 130, 257, 301)
    alone = [encode(tokenizer, [segment])[0] for segment in segments]
    assert all(map(torch.equal, encode(tokenizer, segments), alone))
    assert all(map(torch.equal, encode(tokenizer, segments[::-1]), alone[::-1]))


def test_padded_batches_are_the_same_as_segments(tokenizer):
    segments = mel(5, 17, 40)
    padded = torch.nn.utils.rnn.pad_sequence(segments, batch_first=True, padding_value=9.0)
    output = tokenizer(padded, torch.tensor([5, 17, 40]))
    assert output.audio_code_lengths.tolist() == [2, 5, 10]
    assert torch.equal(output.audio_codes, torch.cat(encode(tokenizer, segments)))
    assert torch.equal(tokenizer.encode(segments[2][None]).audio_codes, encode(tokenizer, segments[2:])[0])


def test_a_token_is_sixteen_frames_or_the_last_few(tokenizer):
    lengths = range(1, 201)
    for length, codes in zip(lengths, encode(tokenizer, mel(*lengths)), strict=True):
        assert len(codes) == tokenizer.code_length(length) == -(-length // 4)
        # groups of four code frames are a token of the language model
        assert -(-len(codes) // 4) == -(-length // 16)
    for length in (5984, 5985, 5999, 6000):
        assert tokenizer.code_length(length) == -(-length // 4)


def test_later_frames_change_no_earlier_code(tokenizer):
    (segment,) = mel(200)
    other = segment.clone()
    other[120:] += 5
    # each convolution looks one place ahead
    before, after = (encode(tokenizer, [frames])[0] for frames in (segment, other))
    assert torch.equal(before[:29], after[:29])
    assert not torch.equal(before[30:], after[30:])


def test_full_layers_see_what_windows_do_not(tokenizer):
    (segment,) = mel(400)
    other = segment.clone()
    other[:8] += 5
    before, after = (encode(tokenizer, [frames])[0] for frames in (segment, other))
    # four windows and more behind the change
    assert not torch.equal(before[40:], after[40:])


def test_windowed_layers_cost_as_much_as_there_are_frames(tokenizer):
    attention = tokenizer.encoder.layers[0].self_attn
    flops = []
    for rows in (512, 1024, 2048):
        states = torch.randn(rows, 4, tokenizer.config.head_dim)
        packing = tokenizer.encoder.packing([rows], torch.randn(rows, tokenizer.config.hidden_size))
        with FlopCounterMode(display=False) as counter:
            attention.attend_window(states, states, states, packing)
        flops.append(counter.get_total_flops())
        assert packing.visible.numel() == 2 * rows * tokenizer.config.sliding_window
    assert flops[1] == 2 * flops[0]
    assert flops[2] == 2 * flops[1]


def test_an_iterator_is_read_as_far_as_needed(tokenizer):
    taken = []

    def segments():
        for index in range(20):
            taken.append(index)
            yield torch.zeros(module.STEP_FRAMES // 4, 128)

    codes = tokenizer.encode_segments(segments())
    next(codes)
    # four segments are a step, and only the fifth one shows it
    assert len(taken) == 5
    assert sum(1 for _ in codes) == 19


def test_decoded_codes_are_the_sum_of_their_entries(folder, tokenizer):
    tensors = load_file(folder / "model.safetensors")
    (codes,) = encode(tokenizer, mel(40))
    expected = sum(
        tensors[f"encoder.quantizer.vq.layers.{level}._codebook.embed"].bfloat16().float()[codes[:, level]]
        for level in range(20)
    )
    assert torch.allclose(tokenizer.decode_codes(codes), expected, atol=1e-5)


def test_weights_in_bfloat16_keep_exact_codebooks(folder):
    tokenizer = MiMoAudioTokenizer.from_pretrained(folder)
    assert tokenizer.dtype == torch.bfloat16
    codebook = tokenizer.encoder.quantizer.vq.layers[0]._codebook
    assert torch.equal(
        codebook.embed, load_file(folder / "model.safetensors")["encoder.quantizer.vq.layers.0._codebook.embed"]
    )
    # entries are rounded anyway, so that casting the module changes none
    entries = codebook.entries()
    assert torch.equal(tokenizer.to(torch.bfloat16).encoder.quantizer.vq.layers[0]._codebook.entries(), entries)


def test_saving_keeps_every_tensor(folder, tmp_path):
    MiMoAudioTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["d_model"] == 64
    assert isinstance(AutoModelForAudioTokenization.from_pretrained(tmp_path), MiMoAudioTokenizer)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MiMoAudioTokenizerConfig)


def test_the_decoder_of_later_files_is_left_aside_by_name(folder, tokenizer, tmp_path):
    later = write_random_audio_tokenizer(tmp_path / "audio_tokenizer", "tiny", decoder=True)
    loaded = MiMoAudioTokenizer.from_pretrained(tmp_path, subfolder="audio_tokenizer", dtype=torch.float32)
    assert sum(name.startswith("decoder.") for name in load_file(later / "model.safetensors")) > 50
    segments = mel(50)
    assert torch.equal(encode(loaded, segments)[0], encode(tokenizer, segments)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("encoder.layers.1.fc1.bias"), "missing encoder.layers.1.fc1.bias"),
        (lambda tensors: tensors.update({"decoder.other": torch.zeros(1)}), "unknown decoder.other"),
        (lambda tensors: tensors.update({"encoder.extra": torch.zeros(1)}), "unknown encoder.extra"),
    ],
)
def test_missing_and_unknown_tensors_are_errors(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        MiMoAudioTokenizer.from_pretrained(tmp_path)


def test_the_released_config_is_read_and_written_back():
    released = json.loads(RELEASED_CONFIG.read_text())
    config = MiMoAudioTokenizerConfig(**released)
    written = config.to_dict()
    assert {key: written[key] for key in released} == released
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim, config.sliding_window) == (
        1024,
        24,
        64,
        128,
    )
    assert config.layer_types == ["sliding_attention", "full_attention"] * 12
    assert MiMoAudioTokenizerConfig().layer_types == config.layer_types
    assert MiMoAudioTokenizerConfig().codebook_size == released["codebook_size"]
    again = MiMoAudioTokenizerConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_the_released_geometry_has_the_released_tensors():
    with torch.device("meta"):
        tokenizer = MiMoAudioTokenizer(MiMoAudioTokenizerConfig(**json.loads(RELEASED_CONFIG.read_text())))
    tensors = tokenizer.state_dict()
    codebooks = {name: tensor for name, tensor in tensors.items() if "_codebook" in name}
    # checkpoint facts: 369 weights of 307,927,040 numbers, 80 buffers
    assert len(tensors) == 449
    assert len(codebooks) == 80
    assert sum(tensor.numel() for name, tensor in tensors.items() if name not in codebooks) == 307_927_040


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_causal": False}, "`encoder_causal`: expected True; the stand-alone"),
        ({"encoder_attn_window_size": [-1, -1]}, "`encoder_attn_window_size`: expected"),
        ({"ln_type": "RMSNorm"}, "`ln_type`: expected 'LayerNorm', got 'RMSNorm'"),
        ({"codebook_size": [1024, 1024]}, "`codebook_size`: expected 20 sizes"),
        ({"encoder_skip_layer_id": 25}, "`skip_layer_id`: expected a layer of 1 to 24, got 25"),
        ({"d_model": 1000}, "`hidden_size`: expected a multiple of 2 \\* 16 heads, got 1000"),
        ({"kernel_size": 4}, "`kernel_size`: expected an odd number, got 4"),
        ({"reference_dtype": "float16"}, "`reference_dtype`: expected one of"),
    ],
)
def test_contradictions_in_the_config_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MiMoAudioTokenizerConfig(**settings)


def test_the_folder_of_a_model_is_no_tokenizer(checkpoints):
    with pytest.raises(ValueError, match=r"got a model of type 'mimo_v2'; .* subfolder="):
        MiMoAudioTokenizer.from_pretrained(checkpoints["fp8_omni"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: encode(t, [torch.zeros(5, 80)]),
            r"`input_features\[0\]`: expected .* \[frames, 128\], got \[5, 80\]",
        ),
        (lambda t: encode(t, [torch.zeros(5, 128), torch.zeros(0, 128)]), r"`input_features\[1\]`: .* got \[0, 128\]"),
        (lambda t: t.encode(torch.zeros(5, 128)), r"`input_features`: expected \[segments, frames, 128\], got"),
        (lambda t: t.encode(torch.zeros(0, 5, 128)), "`input_features`: expected at least one segment"),
        (
            lambda t: t.encode(torch.zeros(1, 5, 128), [6]),
            r"`feature_lengths`: expected 1 lengths of 1 to 5 .*got \[6\]",
        ),
        (lambda t: t.decode_codes(torch.zeros(3, 19).long()), r"`audio_codes`: expected integers \[frames, 20\]"),
        (lambda t: t.decode_codes(torch.zeros(3, 20)), "`audio_codes`: expected integers .* got torch.float32"),
        (lambda t: t.decode_codes(torch.full((3, 20), 200)), r"`audio_codes\[0, 3\]`: expected 0 to 127, got 200"),
        (lambda t: t.decode_codes(torch.full((3, 20), -1)), r"`audio_codes\[0, 0\]`: expected 0 to 1023, got -1"),
    ],
)
def test_bad_input_is_named(tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


def test_there_is_no_decoder(tokenizer):
    with pytest.raises(NotImplementedError, match="decode_codes"):
        tokenizer.decode(torch.zeros(1, 20).long())
