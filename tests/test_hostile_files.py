"""A checkpoint may come from anyone. One function per attack builds it; every command refuses it in one line.

Nothing may take long or much memory, run foreign code or read a file outside the folder, and no conversion may leave a
folder behind. The limits are of the process: memory as `ulimit -d` sets it, and time that it computes.
"""

import json
import os
import pickle
import re
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from modeling_mimo import MiMoV2ForCausalLM
from modeling_mimo.checkpoint_mimo_v2 import INDEX_NAME
from modeling_mimo.cli.main import main
from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert


pytestmark = pytest.mark.usefixtures("one_thread")

MEMORY = 500_000_000
SECONDS = 30

SHARD = "model_mtp.safetensors"
SECRET = "root:x:0:0:"

MANY = 1_000_000

ATTACKS = {}


def attack(function):
    ATTACKS[function.__name__] = function
    return function


def put(path, content):
    """Writes a new file: the old one is a hard link into the sound folder."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def put_header(folder, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    put(folder / SHARD, (len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def edit_index(folder, **files):
    index = json.loads((folder / INDEX_NAME).read_text())
    name = next(name for name, file in index["weight_map"].items() if file == SHARD)
    index["weight_map"][name] = files["file"]
    put(folder / INDEX_NAME, json.dumps(index))


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    values |= changes
    put(folder / "config.json", json.dumps({key: value for key, value in values.items() if value is not None}))


def sparse(path, size, start=b""):
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


# ---- the index


@attack
def index_leaves_the_folder(folder):
    edit_index(folder, file="../../../../../../../../etc/passwd")


@attack
def index_names_an_absolute_path(folder):
    edit_index(folder, file="/etc/passwd")


@attack
def index_names_a_windows_path(folder):
    edit_index(folder, file="..\\..\\secret.safetensors")


@attack
def index_names_a_link_to_a_secret(folder):
    (folder / "link.safetensors").symlink_to("/etc/passwd")
    edit_index(folder, file="link.safetensors")


@attack
def index_names_a_link_to_a_device(folder):
    (folder / "link.safetensors").symlink_to("/dev/zero")
    edit_index(folder, file="link.safetensors")


@attack
def index_names_a_pipe(folder):
    os.mkfifo(folder / "pipe.safetensors")
    edit_index(folder, file="pipe.safetensors")


@attack
def index_names_a_folder(folder):
    (folder / "folder.safetensors").mkdir()
    edit_index(folder, file="folder.safetensors")


@attack
def index_names_a_pickle(folder):
    edit_index(folder, file="pytorch_model.bin")


@attack
def index_moves_the_cursor(folder):
    edit_index(folder, file="a\x1b[2Jb\nc.safetensors")


@attack
def index_has_a_million_keys(folder):
    lines = ",".join(f'"t{number}":"f{number}"' for number in range(MANY))
    put(folder / INDEX_NAME, f'{{"weight_map":{{{lines}}}}}')


@attack
def index_repeats_a_key_at_its_end(folder):
    lines = ",".join(f'"t{number}":"f"' for number in range(60_000))
    put(folder / INDEX_NAME, f'{{"weight_map":{{{lines},"t59999":"g"}}}}')


@attack
def index_is_nested_deeply(folder):
    put(folder / INDEX_NAME, '{"weight_map":' + "[" * 200_000)


@attack
def index_is_larger_than_memory(folder):
    sparse(folder / INDEX_NAME, 2**42)


@attack
def index_expands_in_memory(folder):
    put(folder / INDEX_NAME, b'{"weight_map":{},"x":[' + b"[]," * 20_000_000 + b"0]}")


# ---- headers


@attack
def header_is_longer_than_the_file(folder):
    put_header(folder, {"a": entry(0, 4)}, bytes(4), length=10_000)


@attack
def header_length_is_2_to_the_63(folder):
    put_header(folder, {"a": entry(0, 4)}, bytes(4), length=2**63)


@attack
def header_fills_a_huge_hole(folder):
    sparse(folder / SHARD, 2**42, (2**41).to_bytes(8, "little"))


@attack
def header_offsets_overlap(folder):
    put_header(folder, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))


@attack
def header_offsets_leave_a_hole(folder):
    put_header(folder, {"a": entry(0, 8), "b": entry(12, 16)}, bytes(16))


@attack
def header_offsets_go_past_the_end(folder):
    put_header(folder, {"a": entry(0, 2**40)}, bytes(16))


@attack
def header_shape_is_negative(folder):
    put_header(folder, {"a": entry(0, 4, shape=[-2, -2])}, bytes(4))


@attack
def header_shape_overflows_to_zero(folder):
    put_header(folder, {"a": entry(0, 0, shape=[2**32, 2**32])})


@attack
def header_shape_has_dimensions_beyond_floats(folder):
    put_header(folder, {"a": entry(0, 0, shape=[2**62] * 100)})


@attack
def header_shape_takes_long_to_multiply(folder):
    put_header(folder, b'{"a":{"dtype":"U8","shape":[' + b",".join([b"9" * 4000] * 1000) + b'],"data_offsets":[0,0]}}')


@attack
def header_has_a_number_of_5000_digits(folder):
    put_header(folder, b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}')


@attack
def header_repeats_a_key(folder):
    put_header(
        folder, b'{"a":' + json.dumps(entry(0, 4)).encode() + b',"a":' + json.dumps(entry(4, 8)).encode() + b"}"
    )


@attack
def header_repeats_a_key_at_its_end(folder):
    one = json.dumps(entry(0, 0))
    lines = ",".join(f'"t{number}":{one}' for number in range(60_000))
    put_header(folder, f'{{{lines},"t59999":{one}}}'.encode())


@attack
def header_has_a_million_keys(folder):
    one = json.dumps(entry(0, 0), separators=(",", ":"))
    put_header(folder, ("{" + ",".join(f'"t{number}":{one}' for number in range(MANY)) + "}").encode())


@attack
def header_has_many_keys_of_nothing(folder):
    put_header(folder, ("{" + ",".join(f'"t{number}":0' for number in range(300_000)) + "}").encode())


@attack
def header_expands_in_memory(folder):
    put_header(folder, b'{"a":[' + b"[]," * 20_000_000 + b"0]}")


@attack
def header_is_nested_deeply(folder):
    put_header(folder, b'{"a":' * 100_000)


@attack
def header_has_nan(folder):
    put_header(folder, b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,Infinity]}}')


@attack
def header_has_an_unknown_dtype(folder):
    put_header(folder, {"a": entry(0, 4, dtype="F8_E4M3; rm -rf /")}, bytes(4))


@attack
def header_has_a_dtype_of_another_kind(folder):
    put_header(folder, {"a": entry(0, 4, dtype={"a": []})}, bytes(4))


@attack
def header_has_a_name_that_moves_the_cursor(folder):
    put_header(folder, {"a\x1b[2J\nb": entry(0, 4)}, bytes(4))


@attack
def header_has_a_name_of_10_megabytes(folder):
    put_header(folder, {"a" * 10_000_000: entry(0, 4)}, bytes(4))


@attack
def header_is_a_pickle(folder):
    put(folder / SHARD, pickle.dumps(Bomb(folder / "ran")))


# ---- config.json


@attack
def config_is_nested_deeply(folder):
    put(folder / "config.json", '{"model_type":"mimo_v2","x":' + "[" * 200_000)


@attack
def config_is_nested_too_deeply_to_copy(folder):
    text = (folder / "config.json").read_text()
    put(folder / "config.json", text.rstrip()[:-1] + ',"x":' + "[" * 800 + "]" * 800 + "}")


@attack
def config_is_larger_than_memory(folder):
    sparse(folder / "config.json", 2**42)


@attack
def config_expands_in_memory(folder):
    put(folder / "config.json", b'{"model_type":"mimo_v2","x":[' + b"[]," * 20_000_000 + b"0]}")


@attack
def config_is_a_list(folder):
    put(folder / "config.json", "[1, 2]")


@attack
def config_has_a_number_of_5000_digits(folder):
    put(folder / "config.json", '{"model_type":"mimo_v2","num_hidden_layers":' + "9" * 5000 + "}")


def config_attack(name, **changes):
    def build(folder):
        edit_config(folder, **changes)

    build.__name__ = name
    return attack(build)


RELEASED_KEYS = dict.fromkeys(("hybrid_layer_pattern", "moe_layer_freq", "layernorm_epsilon", "swa_rope_theta"))

config_attack("config_has_nan", attention_value_scale=float("nan"))
config_attack("config_has_infinity", rope_theta=float("inf"))
config_attack("config_has_a_billion_layers", num_hidden_layers=10**9)
config_attack("config_has_a_billion_layers_and_no_pattern", num_hidden_layers=10**9, **RELEASED_KEYS)
config_attack(
    "config_has_a_pattern_for_200_000_layers",
    num_hidden_layers=200_000,
    hybrid_layer_pattern=[1] * 200_000,
    moe_layer_freq=[1] * 200_000,
)
config_attack("config_has_a_pattern_of_lists", hybrid_layer_pattern=[[[]]] * 8)
config_attack("config_has_a_billion_experts", n_routed_experts=10**9)
config_attack("config_has_many_experts_in_every_layer", n_routed_experts=10**5)
config_attack("config_has_a_billion_draft_heads", num_nextn_predict_layers=10**9)
config_attack("config_has_a_huge_vocabulary", vocab_size=10**30)
config_attack("config_has_a_huge_theta", rope_theta=10**400)
config_attack("config_has_a_vision_tower_of_a_billion_blocks", vision_config={"depth": 10**9})
config_attack("config_has_unhashable_blocks", vision_config={"vit_window_attn_types": [[]]})
config_attack("config_has_a_billion_channels", audio_config={"audio_channels": 10**9})
config_attack("config_has_lists_for_numbers", hidden_size=[4096])
config_attack("config_has_a_quantization_of_another_kind", quantization_config=[[]])
config_attack("config_is_of_another_model", model_type={"a": 1})


# ---- the tests


class Bomb:
    """What a pickle can do to whoever reads it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def too_slow(signum, frame):
    raise RuntimeError(f"not refused within {SECONDS} seconds of its own")


@contextmanager
def bounded():
    """At most MEMORY more than now, and SECONDS of computing until the test fails."""
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, before[1]))
    handler = signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.fixture
def hostile(request, checkpoints, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(checkpoints["fp8_fused"], folder, copy_function=os.link)
    put(folder / "pytorch_model.bin", pickle.dumps(Bomb(tmp_path / "ran")))
    ATTACKS[request.param](folder)
    yield folder
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(folder)


every_attack = pytest.mark.parametrize("hostile", ATTACKS, indirect=True)


@every_attack
def test_inspect_and_verify_refuse_it_in_one_line(hostile, capsys):
    for command in ("inspect", "verify"):
        with bounded():
            status = main([command, str(hostile)])
        out, error = capsys.readouterr()
        assert (status, out, error.count("\n")) == (2, "", 1), command
        assert error.startswith("mimo: error: ")
        assert error[:-1].isprintable()
        assert len(error) < 50_000
        assert SECRET not in error


@every_attack
def test_doctor_explains_it(hostile, capsys):
    with bounded():
        status = main(["doctor", str(hostile)])
    out, error = capsys.readouterr()
    assert (status, error) == (1, "")
    assert "\nerror: " in out
    assert out.replace("\n", "").isprintable()
    assert len(out) < 50_000
    assert SECRET not in out


@every_attack
def test_nothing_is_converted(hostile, tmp_path):
    with bounded(), pytest.raises((ValueError, OSError, NotImplementedError)) as caught:
        convert(hostile, tmp_path / "target", progress=False)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "target").exists()


# what reaches our code: Transformers itself reads config.json and index first
LOADED = [
    name
    for name in ATTACKS
    if name.startswith(("header_", "config_has_"))
    or name in ("index_leaves_the_folder", "index_names_an_absolute_path", "index_names_a_pickle")
]


@pytest.mark.parametrize("hostile", LOADED, indirect=True)
def test_nothing_is_loaded(hostile):
    with bounded(), pytest.raises((ValueError, OSError, NotImplementedError, TypeError)) as caught:
        MiMoV2ForCausalLM.from_pretrained(hostile)
    assert SECRET not in str(caught.value)


def test_pickles_alone_are_no_checkpoint(checkpoints, tmp_path, capsys):
    folder = tmp_path / "pickles"
    folder.mkdir()
    shutil.copy(checkpoints["fp8_fused"] / "config.json", folder)
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for command in ("inspect", "verify"):
        assert main([command, str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["doctor", str(folder)]) == 1
    assert "note: pickled files (3): consolidated.00.pth, model.pt, pytorch_model.bin" in capsys.readouterr().out
    with pytest.raises((ValueError, OSError)):
        convert(folder, tmp_path / "target", progress=False)
    with pytest.raises((ValueError, OSError)):
        MiMoV2ForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "target").exists()


def test_files_in_the_audio_tokenizer_are_met_with_the_same_distrust(checkpoints, tmp_path, capsys):
    folder = tmp_path / "audio"
    for number, (name, content) in enumerate(
        (
            ("config.json", b"[" * 200_000),
            ("config.json", json.dumps({"encoder_layers": 10**9}).encode()),
            ("model.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
            ("model.safetensors", pickle.dumps(Bomb(tmp_path / "ran"))),
        )
    ):
        shutil.copytree(checkpoints["fp8_omni"], folder / str(number), copy_function=os.link)
        put(folder / str(number) / "audio_tokenizer" / name, content)
        with bounded():
            assert main(["verify", str(folder / str(number))]) == 1
            assert f"audio_tokenizer/{name}" in capsys.readouterr().out
            assert main(["doctor", str(folder / str(number))]) == 1
            assert f"audio_tokenizer/{name}" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_a_sound_folder_passes_within_the_same_limits(checkpoints, tmp_path, capsys):
    with bounded():
        assert main(["inspect", str(checkpoints["fp8_fused"])]) == 0
        assert main(["verify", str(checkpoints["fp8_fused"])]) == 0
        convert(checkpoints["fp8_fused"], tmp_path / "target", progress=False)
    assert (tmp_path / "target" / "config.json").is_file()
