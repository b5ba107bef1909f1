"""What `mimo doctor` must notice: each thing that users trip over, made on purpose, and silence on a sound folder."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from modeling_mimo.checkpoint_mimo_v2 import INDEX_NAME
from modeling_mimo.cli.doctor import check_gpus, check_memory
from modeling_mimo.cli.main import main
from modeling_mimo.cli.releases import DATA
from modeling_mimo.conversion.doctor import check_disk, check_packages, diagnose
from modeling_mimo.conversion.findings import nearest_release
from modeling_mimo.conversion.random_audio import write_random_audio_tokenizer
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.conversion.small_tokenizer import build_small_tokenizer, save_small_tokenizer


pytestmark = pytest.mark.usefixtures("one_thread")

GIB = 2**30

# the way reasoning was written before V2.5: with line breaks, and an empty line after each turn
OLDER_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "mimo"
    return write_random_checkpoint(folder, "tiny", vision=True, audio=True)


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def sick(folder):
    """Everything but notes."""
    return [finding for finding in diagnose(folder).findings if finding.severity != "note"]


def only(folder):
    (finding,) = sick(folder)
    return finding


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))


def test_a_sound_folder_is_healthy(folder, capsys):
    assert main(["doctor", str(folder)]) == 0
    text = capsys.readouterr().out
    assert text.endswith("healthy: 3 notes\n")
    # the published traps for other programs are notes
    for what in ("preprocessor_config.json has pixel limits", "auto_map", "ignored_layers names only o_proj"):
        assert what in text
    assert main(["doctor", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["healthy"], len(result["findings"])) == (True, 3)
    assert set(result["memory"]) == {"fp8", "bf16"}
    assert set(result["findings"][0]) == {"severity", "what", "why", "fix"}


@pytest.mark.parametrize("layout", ["fused_qkv", "split"])
def test_a_text_only_folder_is_healthy(tmp_path, layout):
    assert sick(write_random_checkpoint(tmp_path / "text", "tiny", layout=layout)) == []


def test_no_folder(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "absent")]) == 2
    assert "expected a checkpoint's folder, got nothing" in capsys.readouterr().err


def test_an_empty_folder(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "config.json: expected a JSON file, got nothing" in text
    assert "expected model.safetensors.index.json or model.safetensors, got neither" in text


# ---- config.json


def released(name="MiMo-V2.5", **changes):
    values = json.loads((DATA / name / "config.json").read_bytes())
    for key, value in changes.items():
        if value is None:
            del values[key]
        else:
            values[key] = value
    return values


@pytest.mark.parametrize("name", ["MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2-Flash", "MiMo-V2.6-Flash-RL"])
def test_each_published_config_is_its_own_nearest(name):
    assert nearest_release(released(name), text_only=False) == (name, {})


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ({"attention_value_scale": 1.0}, {"attention_value_scale": (1.0, 0.707)}),
        ({"attention_value_scale": None}, {"attention_value_scale": ("nothing", 0.707)}),
        ({"rope_theta": 640000}, {"rope_theta": (640000, 10000000)}),
        # a base model has a shorter context, a converted one other projections and no FP8
        ({"max_position_embeddings": 262144, "transformers_version": "4.40.1", "auto_map": None}, {}),
        ({"quantization_config": None, "attention_projection_layout": "split"}, {}),
    ],
)
def test_keys_that_change_results(changes, differ):
    assert nearest_release(released(**changes), text_only=False).differ == differ


def test_keys_inside_the_processor_settings_and_a_text_only_copy():
    values = released()
    values["processor_config"]["fps"] = 2.0
    del values["vision_config"]["use_sink"]
    assert nearest_release(values, text_only=False).differ == {
        "processor_config.fps": (2.0, 1.0),
        "vision_config.use_sink": ("nothing", True),
    }
    text = {key: value for key, value in released().items() if not key.startswith(("vision_", "audio_", "processor_"))}
    assert nearest_release(text, text_only=True).differ == {}
    assert "vision_config" in nearest_release(text, text_only=False).differ


def test_other_geometries_have_no_release(folder):
    assert nearest_release(json.loads((folder / "config.json").read_text()), text_only=False) is None


def test_a_stale_config_is_named_with_the_repository(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released(swa_rope_theta=5000)))
    finding = next(finding for finding in sick(tmp_path) if finding.severity == "warning")
    assert finding.what == "config.json differs from that of MiMo-V2.5: swa_rope_theta is 5000, published 10000"
    assert finding.fix.startswith("hf download XiaomiMiMo/MiMo-V2.5 config.json tokenizer_config.json --local-dir ")


def test_the_first_upload_of_flash_without_value_scale(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released("MiMo-V2-Flash", attention_value_scale=None)))
    assert any("`attention_value_scale`: expected a number" in finding.what for finding in sick(tmp_path))


# ---- weights


def test_a_missing_shard_and_a_cut_one(folder):
    (folder / "model_pp0_ep1_shard0.safetensors").unlink()
    path = folder / "model_pp0_ep0_shard0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = sick(folder)
    assert any(
        "model_pp0_ep1_shard0.safetensors: expected a safetensors file, got nothing" in one.what for one in found
    )
    assert any("truncated file" in one.what for one in found)
    assert all(one.severity == "error" and "hf download" in one.fix for one in found)


def test_git_lfs_pointers(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 34369159872\n"
    for name in ("model_mtp.safetensors", "tokenizer.json", "audio_tokenizer/model.safetensors"):
        (folder / name).write_bytes(pointer)
    first = sick(folder)[0]
    assert first.what == (
        "Git LFS pointers in place of files (3): "
        "audio_tokenizer/model.safetensors, model_mtp.safetensors, tokenizer.json"
    )
    assert first.fix == f"git -C {shlex.quote(str(folder))} lfs pull"


def test_an_unfinished_download(folder):
    cache = folder / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / "abc.incomplete").touch()
    assert only(folder).what == "files of an unfinished download (1): .cache/huggingface/download/abc.incomplete"


def without_mtp(folder):
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if not key.startswith("model.mtp.")}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_draft_heads_that_the_index_does_not_name(folder):
    without_mtp(folder)
    assert only(folder).what.startswith(
        "0 of 3 draft heads (model.mtp.*) in the files, though model_mtp.safetensors is"
    )


def test_lost_draft_heads(folder):
    without_mtp(folder)
    (folder / "model_mtp.safetensors").unlink()
    finding = only(folder)
    assert finding.what == "0 of 3 draft heads (model.mtp.*) in the files; many converters drop them"
    assert "use_mtp=True" in finding.why
    # a config that says so lost nothing
    edit_json(folder / "config.json", num_nextn_predict_layers=0)
    assert sick(folder) == []


def test_weights_that_are_not_those_of_the_config(folder):
    edit_json(folder / "config.json", moe_intermediate_size=64)
    found = sick(folder)
    assert any(finding.what.startswith("mis-shaped (expected, got)") for finding in found)


def test_plain_rows_under_the_released_tag(checkpoints, tmp_path):
    finding = next(one for one in sick(checkpoints["fp8_plain"]) if "qkv_proj" in one.what)
    assert (finding.severity, "plain [Q; K; V]" in finding.what) == ("warning", True)
    assert "--to xiaomi" in finding.fix
    copy = Path(shutil.copytree(checkpoints["fp8_plain"], tmp_path / "copy"))
    edit_json(copy / "config.json", fused_qkv_layout="plain")
    assert not any("qkv_proj" in one.what for one in sick(copy))


def test_a_row_order_that_cannot_be_told(checkpoints, tmp_path):
    def told(place):
        return [one for one in diagnose(place).findings if "cannot be told" in one.what]

    (finding,) = told(checkpoints["bf16_fused"])
    assert finding.severity == "note"
    assert "mimo verify ORIGINAL" in finding.fix
    assert told(checkpoints["fp8_fused"]) == []
    copy = Path(shutil.copytree(checkpoints["bf16_fused"], tmp_path / "copy"))
    edit_json(copy / "config.json", fused_qkv_layout="chunked")
    assert told(copy) == []


def test_quantization_config_and_weights_contradict_each_other(checkpoints, folder, tmp_path):
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=None)
    assert only(folder).what == "weights are FP8, and config.json has no quantization_config"
    copy = Path(shutil.copytree(checkpoints["bf16_fused"], tmp_path / "bf16"))
    edit_json(copy / "config.json", quantization_config=said)
    assert any("has quantization_config, and no weight is FP8" in one.what for one in sick(copy))


def test_pickles_are_a_note_and_are_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    (finding,) = [one for one in diagnose(folder).findings if "pickled" in one.what]
    assert finding.severity == "note"


# ---- audio tokenizer


def test_no_audio_tokenizer(folder):
    shutil.rmtree(folder / "audio_tokenizer")
    finding = only(folder)
    assert finding.what == (
        "audio_tokenizer/config.json and audio_tokenizer/model.safetensors missing, "
        "though config.json has audio_config"
    )
    assert '--include "audio_tokenizer/*"' in finding.fix


def test_the_stand_alone_audio_tokenizer(folder):
    shutil.rmtree(folder / "audio_tokenizer")
    overrides = {
        "encoder_causal": False,
        "encoder_attn_window_size": [-1, -1],
        "codebook_size": [1024] * 2 + [128] * 18,
    }
    write_random_audio_tokenizer(folder / "audio_tokenizer", "tiny", overrides=overrides)
    what = only(folder).what
    assert "encoder_causal is False, expected True" in what
    assert "is it the stand-alone MiMo-Audio-Tokenizer?" in what


def test_weights_of_another_audio_tokenizer(folder):
    edit_json(folder / "audio_tokenizer" / "config.json", encoder_ffn_dim=128)
    assert only(folder).what.startswith("audio_tokenizer/model.safetensors: mis-shaped")
    edit_json(folder / "audio_tokenizer" / "config.json", encoder_ffn_dim="many")
    assert "`encoder_ffn_dim`: expected an int of 1 to" in only(folder).what


def test_levels_that_are_not_the_channels_of_the_model(folder):
    shutil.rmtree(folder / "audio_tokenizer")
    overrides = {"num_quantizers": 8, "codebook_size": [1024, 1024, 256] + [128] * 5}
    write_random_audio_tokenizer(folder / "audio_tokenizer", "tiny", overrides=overrides)
    assert "num_quantizers is 8, expected 20" in only(folder).what


# ---- tokenizer and chat template


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    assert only(folder).what == "tokenizer.json missing"


def test_a_tokenizer_of_another_size(folder):
    save_small_tokenizer(build_small_tokenizer(1024), folder)
    what = only(folder).what
    assert "is not the tokenizer that config.json was written for" in what
    assert "audio_start_token_id is " in what


def test_more_tokens_than_embedding_rows(folder):
    save_small_tokenizer(build_small_tokenizer(3000), folder)
    assert any("tokenizer.json has 3,000 tokens, config.json has vocab_size" in one.what for one in sick(folder))


def test_a_tokenizer_without_the_tokens_of_media(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|mimo_audio_start|>", "<|something_else|>"))
    assert "got one without <|mimo_audio_start|>" in only(folder).what
    (folder / "tokenizer.json").write_text("{}")
    assert only(folder).what.startswith("tokenizer.json: ")


def test_the_older_template_of_the_audio_tokenizer(folder):
    for place in (folder, folder / "audio_tokenizer"):
        (place / "chat_template.jinja").write_text(OLDER_TEMPLATE)
    assert "is the older one of audio_tokenizer/" in only(folder).what


def test_another_template_and_where_it_differs(folder):
    edit_json(folder / "tokenizer_config.json", chat_template=OLDER_TEMPLATE)
    what = only(folder).what
    assert what.startswith(
        "the chat template in tokenizer_config.json is not the published one: probe 1 differs after 12"
    )
    assert "'user" in what
    assert "'system" in what


def test_a_template_file_wins_over_the_tokenizer_config(folder):
    right = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    edit_json(folder / "tokenizer_config.json", chat_template=OLDER_TEMPLATE)
    (folder / "chat_template.jinja").write_text(right)
    assert sick(folder) == []
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": OLDER_TEMPLATE}, {"name": "default", "template": right}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert sick(folder) == []


def test_no_template_and_one_that_fails(folder):
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    assert only(folder).what == "no chat template in tokenizer_config.json and no chat_template.jinja"
    edit_json(folder / "tokenizer_config.json", chat_template="{{ messages.x.y.z }}")
    assert "fails on an ordinary conversation" in only(folder).what
    edit_json(folder / "tokenizer_config.json", chat_template="x" * 300_000)
    assert "expected a chat template of at most 200000 characters" in only(folder).what


def test_missing_settings(folder):
    (folder / "generation_config.json").unlink()
    assert only(folder).what == "generation_config.json missing"


# ---- the machine


def test_memory_in_words():
    needed = {"fp8": 294 * GIB, "bf16": 579 * GIB}
    (finding,) = check_memory("/m", needed, ram=64 * GIB, gpus=[])
    assert finding.severity == "warning"
    assert (
        finding.what == "no room in memory: fp8 takes 294.0 GiB, bf16 takes 579.0 GiB; here are 64.0 GiB of RAM free"
    )
    gpus = [{"name": "H200", "bytes": 139 * GIB}] * 4
    (finding,) = check_memory("/m", needed, ram=16 * GIB, gpus=gpus)
    assert (finding.severity, finding.what.split(":")[0]) == ("note", "room in memory for fp8 only")
    assert check_memory("/m", needed, ram=1024 * GIB, gpus=[]) == []


def test_no_gpus_are_no_old_gpus():
    assert check_gpus({"fp8": 1, "bf16": 2}) == []


def test_a_disk_without_room_for_a_copy(tmp_path):
    assert check_disk(tmp_path, 1) == []
    (finding,) = check_disk(tmp_path, 10**18)
    assert "the weights take 1,000,000,000 GB" in finding.what


def test_installed_versions_fit():
    assert check_packages() == []


def test_nothing_from_the_files_moves_the_cursor(folder, capsys):
    edit_json(folder / "tokenizer_config.json", chat_template="\x1b[2J\n\r{{ messages.x.y }}")
    edit_json(folder / "config.json", model_type="\x1b[31mred\nred")
    assert main(["doctor", str(folder)]) == 1
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\r" not in text
