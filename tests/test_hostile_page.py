"""What a program, another page or another user may try on the page of `mimo demo --web`: a real page on loopback."""

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from importlib.util import find_spec
from pathlib import Path

import pytest
from patience import PATIENCE
from test_demo_web import MEDIA, folder, loaded, served  # noqa: F401


if find_spec("gradio") is None:
    pytest.skip("needs the extra web", allow_module_level=True)

from modeling_mimo.cli import demo_web_doors
from modeling_mimo.cli.demo_web import guarded


pytestmark = pytest.mark.usefixtures("one_thread")

BOUNDARY = "7a3c"


class Visitor:
    """A program at the page, with cookies as a browser has them, or without any."""

    def __init__(self, address, session, has_cookies=True):
        self.address, self.session = address, session
        handlers = [urllib.request.HTTPCookieProcessor(CookieJar())] if has_cookies else []
        self.opener = urllib.request.build_opener(*handlers)
        config = json.loads(self.get("/config")[1])
        self.functions = {entry["api_name"]: entry["id"] for entry in config["dependencies"]}

    def send(self, path, data=None, headers=None, method=None):
        request = urllib.request.Request(self.address + path, data, headers or {}, method=method)
        try:
            with self.opener.open(request, timeout=PATIENCE) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path, **headers):
        return self.send(path, headers=headers)

    def post(self, path, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.send(path, body, {"Content-Type": "application/json", **headers})

    def upload(self, *files):
        """Their paths on the server, or the status that refuses them."""
        parts = [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode() + data
            for name, data in files
        ]
        body = b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        status, answer = self.send("/gradio_api/upload", body, {"Content-Type": kind})
        return json.loads(answer) if status == 200 else (status, json.loads(answer)["detail"])

    def question(self, *paths, name="ask"):
        files = [{"path": str(path), "meta": {"_type": "gradio.FileData"}} for path in paths]
        data = [{"text": "What is in it?", "files": files}, True, False]
        return {"data": data, "fn_index": self.functions[name], "session_hash": self.session}

    def ask(self, *paths):
        """Status of the question, and the last message about it."""
        status, answer = self.post("/gradio_api/queue/join", self.question(*paths))
        if status != 200:
            return status, json.loads(answer)["detail"]
        _, stream = self.get(f"/gradio_api/queue/data?session_hash={self.session}")
        lines = [json.loads(line[5:]) for line in stream.decode().splitlines() if line.startswith("data:")]
        return status, next(line for line in lines if line["msg"] == "process_completed")

    def read(self, path):
        return self.get(f"/gradio_api/file={urllib.parse.quote(str(path))}")


CHART = ("chart.png", (MEDIA / "chart.png").read_bytes())


@pytest.fixture
def visitors(served):  # noqa: F811
    return [Visitor(served[0], name) for name in ("ann1", "bob22")]


@pytest.mark.parametrize("has_cookies", [True, False])
def test_what_a_session_uploads_it_may_ask_about(served, has_cookies):  # noqa: F811
    ann = Visitor(served[0], "ann1", has_cookies)
    (path,) = ann.upload(CHART)
    status, message = ann.ask(path)
    assert (status, message["success"]) == (200, True)
    if has_cookies:
        assert ann.read(path) == (200, CHART[1])


def test_no_file_of_the_machine_is_read(visitors, tmp_path, monkeypatch):
    ann, _ = visitors
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.png").write_bytes(CHART[1])
    (tmp_path / "link.png").symlink_to(tmp_path / "private.png")
    (uploaded,) = ann.upload(("mine.png", CHART[1]))
    inside = Path(uploaded).parent / "link.png"
    inside.symlink_to(tmp_path / "private.png")
    before = sorted((tmp_path / "uploads").rglob("*"))
    for path in (
        tmp_path / "private.png",
        tmp_path / "link.png",
        inside,
        "private.png",
        "/etc/passwd",
        "/proc/self/environ",
        f"{Path(uploaded).parent}/../../../private.png",
        f"{Path(uploaded).parent}//{Path(uploaded).name}",
        f"file://{tmp_path}/private.png",
        "http://127.0.0.1:9/private.png",
        MEDIA / "chart.png",
        MEDIA.parent / "media" / ".." / "finetune",
    ):
        assert ann.ask(path)[0] == 403, path
        assert ann.ask(uploaded, path)[0] == 403, path
        if path != MEDIA / "chart.png":
            assert ann.read(path)[0] in (403, 404), path
            assert ann.read(urllib.parse.quote(str(path)))[0] in (403, 404), path
    assert sorted((tmp_path / "uploads").rglob("*")) == before


def test_a_path_is_refused_wherever_it_stands(visitors, tmp_path):
    ann, _ = visitors
    (tmp_path / "private.png").write_bytes(CHART[1])
    file = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
    for name in ann.functions:
        for data in ([file], [{"files": [[{"a": file}]]}], [{"text": "", "files": [file]}, True, False]):
            content = {**ann.question(), "fn_index": ann.functions[name], "data": data}
            for route in ("queue/join", "run/predict", f"run/{name}"):
                assert ann.post(f"/gradio_api/{route}", content)[0] == 403
    for route in (f"call/{name}", f"call/v2/{name}", f"api/{name}", "component_server", "process_recording"):
        assert ann.post(f"/gradio_api/{route}", ann.question(tmp_path / "private.png"))[0] == 404
    for body in (b"", b"[]", b"{", b"[" * 100_000, b'{"session_hash": [1]'):
        assert ann.post("/gradio_api/queue/join", body)[0] == 400
    assert ann.post("/gradio_api/queue/join", b" " * (demo_web_doors.MAX_BODY + 1))[0] == 413


def test_gradio_itself_checks_paths_behind_our_doors(served, tmp_path):  # noqa: F811
    """Its check is off for mounted pages, where nobody turns it on."""
    from starlette.routing import Mount
    from starlette.testclient import TestClient

    address, app = served
    ask = Visitor(address, "ann1")
    (tmp_path / "private.png").write_bytes(CHART[1])
    (page,) = [route.app for route in guarded(app).routes if isinstance(route, Mount)]
    with TestClient(page) as client:
        client.post("/gradio_api/queue/join", json=ask.question(tmp_path / "private.png"))
        stream = client.get("/gradio_api/queue/data", params={"session_hash": "ann1"}).text
    lines = [json.loads(line[5:]) for line in stream.splitlines() if line.startswith("data:")]
    assert [line["success"] for line in lines if line["msg"] == "process_completed"] == [False]
    assert not list((tmp_path / "uploads").rglob("private.png"))


def test_a_session_has_nothing_of_another(visitors, served):  # noqa: F811
    ann, bob = visitors
    (path,) = ann.upload(CHART)
    assert bob.ask(path) == (403, "'chart.png': expected a file that this session uploaded, got another path")
    assert bob.read(path)[0] == 403
    assert ann.ask(path)[1]["success"]
    assert bob.read(path)[0] == 403
    # and not as it either
    bob.session = ann.session
    assert bob.ask()[0] == 403
    # streams that are open would not end
    assert bob.send(f"/gradio_api/queue/data?session_hash={ann.session}", method="HEAD")[0] == 403
    assert bob.send(f"/gradio_api/heartbeat/{ann.session}", method="HEAD")[0] == 403
    assert bob.post("/gradio_api/cancel", {"session_hash": ann.session, "event_id": "a", "fn_index": 0})[0] == 403
    stranger = Visitor(served[0], "cem333", has_cookies=False)
    assert stranger.read(path)[0] == 403
    assert stranger.ask(path)[0] == 403
    # the same bytes, uploaded, are everybody's own
    bob.session = "bob22"
    assert bob.upload(CHART) == [path]
    assert bob.ask(path)[1]["success"]


def test_without_cookies_a_file_is_that_of_the_first_session_that_asks(served):  # noqa: F811
    ann, bob = (Visitor(served[0], name, has_cookies=False) for name in ("ann1", "bob22"))
    (path,) = ann.upload(CHART)
    assert ann.ask(path)[1]["success"]
    assert bob.ask(path)[0] == 403
    assert bob.read(path)[0] == 403
    # what stands for its session inside is no cookie
    port = served[0].rpartition(":")[2]
    assert bob.get(f"/gradio_api/file={path}", Cookie=f"mimo_{port}=session ann1")[0] == 403


@pytest.mark.parametrize("cookie", ["", "a" * 32, '"', "é", "a" * 5000, "a=b; c; =;;"])
def test_a_cookie_that_is_made_up_opens_nothing(served, visitors, cookie):  # noqa: F811
    (path,) = visitors[0].upload(CHART)
    port = served[0].rpartition(":")[2]
    stranger = Visitor(served[0], "cem333", has_cookies=False)
    header = {"Cookie": f"mimo_{port}={cookie}".encode().decode("latin-1")}
    assert stranger.get(f"/gradio_api/file={path}", **header)[0] == 403
    assert stranger.post("/gradio_api/queue/join", stranger.question(path), **header)[0] == 403


def test_other_pages_and_other_names_are_refused(visitors, served):  # noqa: F811
    ann, _ = visitors
    (path,) = ann.upload(CHART)
    address = served[0]
    port = address.rpartition(":")[2]
    for headers in (
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": f"http://localhost:{port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": f"https://127.0.0.1:{port}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert ann.post("/gradio_api/queue/join", ann.question(), **headers)[0] == 403, headers
        assert ann.get(f"/gradio_api/file={path}", **headers)[0] == 403, headers
    assert ann.get("/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200
    for host in ("elsewhere.example", f"elsewhere.example:{port}", "127.0.0.1.nip.io", ""):
        for target in ("/", "/config", f"/gradio_api/file={path}"):
            assert ann.get(target, Host=host)[0] == 400, host
    own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
    assert ann.post("/gradio_api/queue/join", ann.question(path), **own)[0] == 200


def test_routes_that_the_page_does_not_use_are_closed(visitors):
    ann, _ = visitors
    for path in (
        "/gradio_api/file=http://127.0.0.1:9/a",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:9/a",
        "/gradio_api/stream/a/b/1/playlist-file",
        "/gradio_api/custom_component/1/client/component/index.js",
        "/gradio_api/openapi.json",
        "/monitoring",
        "/gradio_api/vibe-code",
        "/gradio_api/dev/reload",
        "/gradio_api/runs",
    ):
        assert ann.get(path)[0] in (403, 404), path
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert ann.send("/", method=method)[0] == 404
    # what is left leads into no other folder
    for prefix in ("/static/", "/assets/", "/svelte/"):
        for escape in ("../../../../../etc/passwd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd", "%2Fetc%2Fpasswd"):
            assert ann.get(prefix + escape)[0] in (400, 403, 404)


def test_uploads_are_few_and_small(visitors, monkeypatch, tmp_path):
    ann, bob = visitors
    one = len(CHART[1])
    monkeypatch.setattr(demo_web_doors, "MAX_UPLOAD", 2 * one)
    status, text = ann.upload(("a.png", CHART[1] * 2))
    assert (status, text.partition(",")[0]) == (413, f"upload: expected at most {2 * one} bytes")
    monkeypatch.setattr(demo_web_doors, "MAX_UPLOADS", 3 * one)
    for index in range(2):
        assert len(ann.upload((f"{index}.png", CHART[1][:-1] + bytes([index])))) == 1
    status, text = ann.upload(("c.png", CHART[1]))
    assert status == 413
    assert "of a browser, got" in text
    # which another one does not feel, until all of them together are too much
    assert len(bob.upload(CHART)) == 1
    monkeypatch.setattr(demo_web_doors, "MAX_TOTAL", 3 * one)
    assert bob.upload(("d.png", b"d" * 99))[0] == 413
    monkeypatch.setattr(demo_web_doors, "MAX_TOTAL", 99 * one)
    monkeypatch.setattr(demo_web_doors, "MAX_FILES", 2)
    assert len(bob.upload(("d.png", b"d"))) == 1
    assert bob.upload(("e.png", b"e"))[1].endswith("2 files of a browser, got more")
    files = [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["0.png", "1.png", "chart.png", "d.png"]


def test_an_upload_without_a_length_is_refused(visitors):
    ann, _ = visitors
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(ann.address).netloc, timeout=PATIENCE)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()


@pytest.mark.parametrize("name", ["../../evil.png", "/etc/evil.png", "..", ".", "a\\..\\b.png", "%2e%2e%2fevil.png"])
def test_the_name_of_an_upload_leads_nowhere(visitors, tmp_path, name):
    ann, _ = visitors
    ann.upload((name, b"evil"))
    for path in tmp_path.rglob("*"):
        assert path.is_relative_to(tmp_path / "uploads")
    assert not os.path.exists("/etc/evil.png")
