"""Publishing against a Hub that answers on this machine: what is sent, what is refused, what a second call adds."""

import base64
import hashlib
import json
import re
import shutil
import threading
import wave
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import huggingface_hub
import numpy as np
import pytest
from audio_media import sound
from huggingface_hub import ModelCard
from media import picture
from PIL import Image

from modeling_mimo.cli.main import main
from modeling_mimo.conversion.export_code import export_code
from modeling_mimo.conversion.model_card import PATH, UNVERIFIED, complete_card, model_card, source_name
from modeling_mimo.conversion.publish import publish
from modeling_mimo.conversion.random_checkpoint import released_config, write_random_checkpoint


pytestmark = pytest.mark.usefixtures("one_thread")

REPO = "somebody/MiMo-small"
SMALL = {"num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]}

REPORT = {
    "source": "/home/somebody/models/MiMo-V2.5",
    "revision": None,
    "to": "hub",
    "dtype": "keep",
    "layout": "split",
    "parts": ["text", "mtp", "vision", "audio"],
    "total_size": 1234,
    "tensors": 17,
    "peak_memory": 5,
    "files": [
        {"name": "model-00001-of-00001.safetensors", "bytes": 1300, "sha256": "ab" * 32, "tensors": 17},
        {"name": "tokenizer.json", "bytes": 7, "sha256": "cd" * 32},
    ],
    "errors": {"attention.qkv_proj": {"tensors": 9, "max_relative": 0.0312, "mean_relative": 0.0091}},
    "changes": ["9 attention projections chunked -> split, FP8 blocks requantized in 9 of them"],
    "dry_run": False,
}
VERIFICATION = {
    "name": "/home/somebody/converted",
    "headers_only": False,
    "files": 1,
    "tensors": 17,
    "elements": 1000,
    "parameters": 900,
    "bytes": 1234,
    "parts": {},
    "layout": "split",
    "scales": {"attention": (0.0001, 0.002)},
    "audio_tokenizer": 149,
    "manifest": None,
    "comparison": {
        "equal": 8,
        "dequantized": 0,
        "different": 9,
        "groups": {
            "attention": {
                "tensors": 9,
                "equal": 0,
                "dequantized": 0,
                "different": 9,
                "errors": {"max_abs": 0.1, "mean_abs": 0.01, "rms_relative": 0.0126},
                "worst": None,
            },
        },
    },
    "problems": [],
}


class FakeHub(ThreadingHTTPServer):
    """The few endpoints that an upload needs. Every file is small enough here to be sent inside its commit.

    branches: branch -> {path: content}. commits: files of every commit that was taken, in order. refuse: a commit with
    this file is answered with 403.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.private, self.branches = None, None, {}
        self.commits, self.requests, self.tokens, self.refuse = [], [], set(), None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        hub, path = self.server, urlparse(self.path).path
        hub.requests.append(f"GET {path}")
        tree = re.fullmatch(rf"/api/models/{REPO}/tree/([^/]+)", path)
        if tree and tree[1] in hub.branches:
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
                for name, data in hub.branches[tree[1]].items()
            ]
            return self.reply(200, files)
        if path == f"/api/models/{REPO}/revision/main":
            return self.reply(200, {"id": REPO, "sha": "0" * 40})
        return self.reply(404, {"error": f"unknown {path}"})

    def do_POST(self):
        hub, url = self.server, urlparse(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append(f"POST {url.path}")
        hub.tokens.add(self.headers["Authorization"])
        if url.path == "/api/repos/create":
            return self.create(json.loads(body))
        if url.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        action = re.fullmatch(rf"/api/models/{REPO}/(branch|preupload|commit)/([^/]+)", url.path)
        if action is None or parse_qs(url.query):
            return self.reply(404, {"error": f"unknown {self.path}"})
        if action[1] == "branch":
            known = action[2] in hub.branches
            hub.branches.setdefault(action[2], {})
            return self.reply(409 if known else 201, {})
        files = hub.branches[action[2]]
        if action[1] == "preupload":
            return self.preupload(files, json.loads(body))
        return self.commit(files, [json.loads(line) for line in body.splitlines()])

    def create(self, wanted):
        hub, name = self.server, f"{wanted['organization']}/{wanted['name']}"
        if hub.repo is not None:
            return self.reply(409, {"url": f"{hub.url}/{hub.repo}", "error": "exists"})
        hub.repo, hub.private = name, wanted.get("private", wanted.get("visibility") == "private")
        hub.branches["main"] = {}
        return self.reply(200, {"url": f"{hub.url}/{name}", "id": name})

    def preupload(self, files, asked):
        known = {path: blob_id(data) for path, data in files.items()}
        answers = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": known.get(file["path"])}
            for file in asked["files"]
        ]
        return self.reply(200, {"files": answers})

    def commit(self, files, lines):
        hub = self.server
        sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        if hub.refuse in sent:
            return self.reply(403, {"error": "storage is full"})
        files.update({path: base64.b64decode(content) for path, content in sent.items()})
        hub.commits.append(sorted(sent))
        return self.reply(200, {"commitUrl": f"{hub.url}/{REPO}/commit/0", "commitOid": "0" * 40, "success": True})


def blob_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish") / "original"
    write_random_checkpoint(folder, "tiny", overrides=SMALL, vision=True, audio=True)
    (folder / "audio_tokenizer" / ".DS_Store").write_text("hidden")
    (folder / ".env").write_text("HF_TOKEN=secret")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


def visible(folder):
    """Path -> content of every file that is not hidden."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_the_repository_holds_every_file_but_the_hidden_ones(hub, folder):
    assert publish(folder, REPO, token="hf_some") == f"{hub.url}/{REPO}"
    assert hub.branches == {"main": visible(folder)}
    assert {"audio_tokenizer/model.safetensors", "README.md"} < hub.branches["main"].keys()
    assert hub.private is False
    assert hub.tokens == {"Bearer hf_some"}


def test_a_private_repository_and_a_branch(hub, folder):
    url = publish(folder, REPO, private=True, revision="fp8", token="hf_some")
    assert url == f"{hub.url}/{REPO}/tree/fp8"
    assert hub.private is True
    assert hub.branches == {"main": {}, "fp8": visible(folder)}


def test_an_interrupted_upload_goes_on_where_it_was(hub, folder):
    # more files than go into one commit after an error
    export_code(folder)
    hub.refuse = "weight_mapping_mimo_v2.py"
    with pytest.raises(OSError, match="403"):
        publish(folder, REPO, token="hf_some")
    before = dict(hub.branches["main"])
    assert 0 < len(before) < len(visible(folder))
    taken, hub.refuse = len(hub.commits), None
    publish(folder, REPO, token="hf_some")
    assert hub.branches["main"] == visible(folder)
    assert sorted(path for commit in hub.commits[taken:] for path in commit) == sorted(visible(folder).keys() - before)


def test_a_second_upload_sends_nothing(hub, folder):
    publish(folder, REPO, token="hf_some")
    taken = len(hub.commits)
    publish(folder, REPO, token="hf_some")
    assert len(hub.commits) == taken


def test_weights_of_another_checkpoint_in_the_repository_are_named(hub, folder):
    publish(folder, REPO, token="hf_some")
    hub.branches["main"]["model.safetensors"] = b"older"
    hub.branches["main"]["notes.txt"] = b"may stay"
    with pytest.raises(ValueError, match=r"expected no weights but those of .*, got model\.safetensors; delete"):
        publish(folder, REPO, token="hf_some")


def test_the_card_gets_the_name_and_the_verification(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "README.md").write_text(model_card(config, REPORT))
    publish(folder, REPO, token="hf_some")
    card = hub.branches["main"]["README.md"].decode()
    assert f'path = "{REPO}"' in card
    assert PATH not in card
    assert UNVERIFIED not in card
    assert "| problems | none |" in card
    assert f"`{'ab' * 32}`" in card


def test_a_card_of_somebody_else_stays(hub, folder):
    (folder / "README.md").write_text("# Mine\n")
    publish(folder, REPO, token="hf_some")
    assert hub.branches["main"]["README.md"] == b"# Mine\n"


def unfinished(folder):
    (folder / "model-00002.safetensors.partial").write_bytes(b"")


def with_journal(folder):
    (folder / "journal.jsonl").write_text("{}\n")


def with_pickle(folder):
    (folder / "dflash").mkdir()
    (folder / "dflash" / "mask_embedding.pt").write_bytes(b"")


def without_config(folder):
    (folder / "config.json").unlink()


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def without_hearing(folder):
    shutil.rmtree(folder / "audio_tokenizer")


def cut_short(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (unfinished, r"expected a finished conversion, got model-00002\.safetensors\.partial"),
        (with_journal, r"expected a finished conversion, got journal\.jsonl"),
        (with_pickle, r"files that can run code: dflash/mask_embedding\.pt"),
        (without_config, r"expected a checkpoint with config\.json, got none"),
        (without_tokenizer, r"got no tokenizer\.json"),
        (without_hearing, "audio_tokenizer"),
        (cut_short, "truncated file"),
    ],
)
def test_a_folder_that_is_not_fit_is_refused_before_the_first_request(hub, folder, damage, expected):
    damage(folder)
    with pytest.raises(ValueError, match=expected) as error:
        publish(folder, REPO, token="hf_some")
    assert "\n" not in str(error.value)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["MiMo", "a/b/c", "somebody/Mi Mo", "somebody/..", "", "somebody/x.git"])
def test_a_wrong_repository_is_refused_in_one_line(hub, folder, repo_id):
    with pytest.raises(ValueError, match="repo_id: expected owner/name") as error:
        publish(folder, repo_id, token="hf_some")
    assert "\n" not in str(error.value)
    assert hub.requests == []


def test_without_a_token_the_command_for_one_is_named(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="run `hf auth login`"):
        publish(folder, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "tag", "media"),
    [
        ({"vision": True, "audio": True}, "any-to-any", ["picture.png", "sound.wav"]),
        ({"vision": True}, "image-text-to-text", ["picture.png"]),
        ({"layout": "split"}, "text-generation", []),
    ],
)
def test_the_metadata_is_what_the_hub_reads(options, tag, media):
    card = ModelCard(model_card(released_config("tiny", **options), REPORT, VERIFICATION, REPO))
    assert card.data.to_dict() == {
        "base_model": "XiaomiMiMo/MiMo-V2.5",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": tag,
        "tags": ["mimo_v2", "moe", "conversational", "fp8"],
    }
    assert [name for name in ("picture.png", "sound.wav") if name in card.text] == media


def test_the_card_tells_what_was_made_changed_and_measured():
    card = model_card(released_config("tiny"), REPORT, VERIFICATION, REPO)
    for line in (
        "# MiMo-small",
        "Made of `MiMo-V2.5` by `mimo convert --to hub --dtype keep`: 17 tensors, 1,234 bytes",
        f"| `model-00001-of-00001.safetensors` | 1,300 | `{'ab' * 32}` |",
        "- 9 attention projections chunked -> split, FP8 blocks requantized in 9 of them",
        "| attention.qkv_proj | 9 | 3.12e-02 | 9.10e-03 |",
        "| FP8 scales, attention | 0.0001 to 0.002 |",
        "| attention | 0 | 0 | 9 | 1.26e-02 |",
        "| problems | none |",
    ):
        assert line in card.splitlines() or line in card, line
    # the machine it was made on is nobody's business
    assert "/home" not in card
    assert "MIT" in card


def test_a_card_completed_later_is_the_card_written_at_once():
    config = released_config("tiny", vision=True)
    later = complete_card(model_card(config, REPORT), REPO, VERIFICATION)
    assert later.replace("# MiMo-V2.5\n", "# MiMo-small\n") == model_card(config, REPORT, VERIFICATION, REPO)


@pytest.mark.parametrize(
    ("source", "revision", "expected"),
    [
        ("XiaomiMiMo/MiMo-V2.5", "6365158", "XiaomiMiMo/MiMo-V2.5"),
        ("models/MiMo-V2.5", None, "MiMo-V2.5"),
        ("/cache/models--XiaomiMiMo--MiMo-V2.5-Pro/snapshots/6365158", "6365158", "XiaomiMiMo/MiMo-V2.5-Pro"),
        ("/home/somebody/my-tune", None, "my-tune"),
    ],
)
def test_the_source_is_a_repository_or_the_name_of_a_folder(source, revision, expected):
    report = REPORT | {"source": source, "revision": revision}
    assert source_name(report) == expected
    data = ModelCard(model_card(released_config("tiny"), report)).data
    is_release = expected.split("/")[-1].startswith("MiMo-V2.5")
    assert data.base_model == (f"XiaomiMiMo/{expected.split('/')[-1]}" if is_release else None)


@pytest.mark.parametrize("options", [{"vision": True, "audio": True}, {"layout": "split"}])
def test_the_usage_of_the_card_runs(options, tmp_path, monkeypatch, capsys):
    folder = write_random_checkpoint(tmp_path / "model", "tiny", overrides=SMALL, **options)
    config = json.loads((folder / "config.json").read_text())
    (code,) = re.findall(r"```python\n(.*?)```", model_card(config, repo_id=str(folder)), re.S)
    Image.fromarray(picture(64, 96)).save(tmp_path / "picture.png")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 24000, 0, "NONE", None))
        file.writeframes((sound(0.5, 24000) * 20000).astype(np.int16).tobytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 20


def test_convert_asks_for_a_token_before_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    arguments = ["convert", str(tmp_path / "nowhere"), str(tmp_path / "dst"), "--publish", "me/model"]
    assert main(arguments) == 2
    assert "token: expected an access token of the Hub, got none" in capsys.readouterr().err
    assert main([*arguments[:-1], "no owner"]) == 2
    assert "no owner" in capsys.readouterr().err
