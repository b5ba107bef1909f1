"""Media that reach for other files, the network or other programs, and media that make a decoder stumble.

Beside every attack lies a real clip that it names. Where FFmpeg would really follow, the test shows that with
`allow_any_format`, so that a door that is closed for another reason is not taken for ours.
"""

import ast
import base64
import io
import json
import os
import socket
import struct
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import openai
import pytest
import soundfile
from audio_media import sound
from audio_media import sound_file as sound_bytes
from media import clip, image_file, picture, video_file
from patience import PATIENCE
from PIL import EpsImagePlugin, Image
from test_cli_serve import folders, loaded, running  # noqa: F401

from modeling_mimo.cli.serve_requests import MediaPolicy
from modeling_mimo.processors import allow_any_format
from modeling_mimo.processors import media_opening_mimo_v2 as opening
from modeling_mimo.processors.audio_files_mimo_v2 import open_audio
from modeling_mimo.processors.media_loading_mimo_v2 import load_image
from modeling_mimo.processors.video_files_mimo_v2 import open_video


pytestmark = pytest.mark.usefixtures("one_thread")

PACKAGE = Path(__file__).parents[1]
FRAMES = 10
# texts that name a clip, by path or by URL
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
MPD = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S">'
    '<Period><AdaptationSet contentType="video"><Representation id="0" mimeType="video/mp4" bandwidth="1"><BaseURL>{}'
    "</BaseURL></Representation></AdaptationSet></Period></MPD>"
)
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
ASS = (
    "[Script Info]\nScriptType: v4.00+\n\n[Events]\nFormat: Start, End, Text\nDialogue: 0:00:00.00,0:00:02.00,{path}\n"
)
TEXTS = {
    "ffconcat": "ffconcat version 1.0\nfile private.ts\n",
    "ffconcat of a path": "ffconcat version 1.0\nfile {path}\n",
    "ffconcat of a URL": "ffconcat version 1.0\nfile {url}\n",
    "ffconcat of a file URL": "ffconcat version 1.0\nfile file:{path}\n",
    "ffconcat of a protocol": "ffconcat version 1.0\nfile subfile,,start,0,end,9999,,:{path}\n",
    "m3u8": PLAYLIST.replace("{}", "{path}"),
    "m3u8 of a URL": PLAYLIST.replace("{}", "{url}"),
    "m3u8 of a file URL": PLAYLIST.replace("{}", "file://{path}"),
    "mpd": MPD.replace("{}", "file://{path}"),
    "mpd of a URL": MPD.replace("{}", "{url}"),
    "sdp": SDP,
    "ass": ASS,
    "srt": "1\n00:00:00,000 --> 00:00:01,000\n{path}\n\n",
    "vtt": "WEBVTT\n\n00:00.000 --> 00:01.000\n{path}\n",
    "ffmetadata": ";FFMETADATA1\ntitle={path}\n",
    "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{path}"/></svg>',
    "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n({path}) run\n%%EOF\n",
}
OPENERS = {
    "image": lambda item: load_image(item, "images[0]"),
    "video": lambda item: open_video(item, "videos[0]", 1.0),
    "audio": lambda item: open_audio(item, "audio[0]", 16000),
}


@pytest.fixture
def any_format():
    allow_any_format()
    yield
    allow_any_format(False)


@pytest.fixture(scope="module")
def listener():
    """A socket that nobody may connect to."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock


@pytest.fixture
def texts(tmp_path, listener, monkeypatch):
    """Name -> the text, with the clip that it names beside it, and in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = video_file(tmp_path / "private.ts", clip(FRAMES))
    port = listener.getsockname()[1]
    names = {"path": path, "url": f"http://127.0.0.1:{port}/private.ts", "port": port}
    return {name: text.format(**names).encode() for name, text in TEXTS.items()}


def refusal(opener, item):
    """The one line of its error."""
    with pytest.raises(ValueError, match=": expected ") as caught:
        opener(item)
    message = str(caught.value)
    assert message.startswith(("images[0]: ", "videos[0]: ", "audio[0]: "))
    assert "\n" not in message
    return message


def assert_nobody_came(listener):
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.parametrize("kind", OPENERS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_names_a_file_is_refused_and_tells_nothing_of_it(texts, listener, tmp_path, kind, name):
    text, opener = texts[name], OPENERS[kind]
    there = [refusal(opener, text)]
    for suffix in ("mp4", "m3u8", "sdp", "mpd", "wav", "eps", "raw", "sd2"):
        (tmp_path / f"attack.{suffix}").write_bytes(text)
        there.append(refusal(opener, tmp_path / f"attack.{suffix}"))
    (tmp_path / "private.ts").unlink()
    assert refusal(opener, text) == there[0]
    assert not any("Dialogue" in message or "private" in message.replace(str(tmp_path), "") for message in there)
    assert_nobody_came(listener)


@pytest.mark.usefixtures("any_format")
def test_the_flag_opens_what_is_trusted(texts, tmp_path):
    (tmp_path / "list.m3u8").write_text(PLAYLIST.format("private.ts"))
    for item in (texts["ffconcat"], tmp_path / "list.m3u8"):
        assert len(open_video(item, "videos[0]", 1.0).times) == FRAMES


def test_numbered_files_are_one_name_and_no_pattern(tmp_path):
    for index in range(3):
        (tmp_path / f"frame{index}.png").write_bytes(image_file(picture(32, 32), "PNG"))
    for pattern in ("frame%d.png", "frame*.png", "concat:frame0.png|frame1.png"):
        for opener in OPENERS.values():
            with pytest.raises(FileNotFoundError):
                opener(tmp_path / pattern)
        # and where a file is called so, it is that file
        (tmp_path / pattern).write_bytes(b"no picture" * 9)
        refusal(OPENERS["video"], tmp_path / pattern)


@pytest.mark.parametrize("option", ["format_whitelist", "protocol_whitelist", "codec_whitelist"])
def test_every_option_of_ffmpeg_is_in_force(texts, tmp_path, monkeypatch, option):
    """Each is seen to refuse what goes through without it."""
    formats = f"{opening.FFMPEG_OPTIONS['format_whitelist']},concat"

    def pixels():
        """Whether FFmpeg has decoded a stream to see what it is; the sound beside it is what is asked for."""
        with opening.open_container(str(tmp_path / "a.mkv"), "videos[0]", "audio") as (container, _):
            return container.streams.video[0].codec_context.pix_fmt

    if option == "format_whitelist":
        path = video_file(tmp_path / "a.nut", clip(4), "mpeg4")
        refused, opened = (lambda: open_video(path, "videos[0]", 1.0)), 4
    elif option == "protocol_whitelist":
        monkeypatch.setattr(opening, "FFMPEG_OPTIONS", {**opening.FFMPEG_OPTIONS, "format_whitelist": formats})
        refused, opened = (lambda: open_video(texts["ffconcat"], "videos[0]", 1.0)), FRAMES
    else:
        video_file(tmp_path / "a.mkv", clip(4), "jpeg2000")
        assert pixels() is None
        monkeypatch.setattr(opening, "FFMPEG_OPTIONS", {**opening.FFMPEG_OPTIONS, option: None})
    if option != "codec_whitelist":
        with pytest.raises(ValueError, match="in another one"):
            refused()
    left = {key: value for key, value in opening.FFMPEG_OPTIONS.items() if key != option}
    monkeypatch.setattr(opening, "FFMPEG_OPTIONS", left)
    if option == "codec_whitelist":
        assert pixels() == "yuv420p"
    else:
        assert len(refused().times) == opened


def test_a_codec_outside_the_list_is_refused_by_name(tmp_path, any_format):
    path = video_file(tmp_path / "a.mkv", clip(4), "jpeg2000")
    assert len(open_video(path, "videos[0]", 1.0).times) == 4
    allow_any_format(False)
    assert "got jpeg2000" in refusal(OPENERS["video"], path)


def test_a_picture_starts_no_program(tmp_path, monkeypatch, any_format):
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = io.BytesIO()
    Image.fromarray(picture(32, 32)).save(eps, "EPS")
    for flag, started in ((False, False), (True, True)):
        allow_any_format(flag)
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
        refusal(OPENERS["image"], eps.getvalue())
        refusal(OPENERS["video"], eps.getvalue())
        assert (tmp_path / "started").exists() == started


@pytest.mark.parametrize("format", ["TGA", "PCX", "SGI", "ICNS", "DDS", "IM", "XBM", "PDF"])
def test_formats_of_pictures_outside_the_list_are_refused(tmp_path, format):
    mode = "1" if format == "XBM" else "RGB"
    data = image_file(Image.new(mode, (64, 64)), format)
    (tmp_path / f"a.{format.lower()}").write_bytes(data)
    for item in (data, tmp_path / f"a.{format.lower()}"):
        assert f"opened are {', '.join(opening.IMAGE_FORMATS)}" in refusal(OPENERS["image"], item)


@pytest.mark.parametrize("format", ["VOC", "SVX", "NIST", "XI", "MAT5", "PVF", "HTK", "AVR", "PAF", "IRCAM"])
def test_formats_of_sound_outside_the_list_are_refused(format):
    data = sound_bytes(sound(0.2, 16000), 16000, format, "DPCM_16" if format == "XI" else None)
    with pytest.MonkeyPatch.context() as patch:
        # libsndfile never gets it
        patch.delattr(soundfile, "SoundFile")
        refusal(OPENERS["audio"], data)
    # a tag ahead of it, which libsndfile skips, changes nothing
    refusal(OPENERS["audio"], b"ID3\x04\x00\x00\x00\x00\x00\x00" + data)


# ---- decoders that stumble


def qoi(size):
    header = b"qoif" + struct.pack(">IIBB", 64, 64, 3, 0)
    pixels = b"".join(b"\xfe" + bytes(pixel) for pixel in picture(64, 64).reshape(-1, 3).tolist())
    return (header + pixels)[:size]


def dds_of_an_unknown_format():
    data = bytearray(image_file(Image.new("RGB", (64, 64)), "DDS"))
    data[80:88] = struct.pack("<I4s", 4, b"NONE")
    return bytes(data)


def icns_bomb():
    png = image_file(Image.new("1", (30000, 12000)), "PNG")
    return b"icns" + struct.pack(">I", 16 + len(png)) + b"ic10" + struct.pack(">I", 8 + len(png)) + png


def avif_without_data():
    data = image_file(picture(64, 64), "AVIF")
    at = data.index(b"mdat") + 4
    return data[:at] + bytes(len(data) - at)


def blp():
    return b"BLP2" + struct.pack("<iBBBBII", 1, 9, 9, 9, 9, 64, 64) + bytes(1200)


STUMBLES = {
    "QOI": lambda: qoi(60),
    "DDS": dds_of_an_unknown_format,
    "ICNS": icns_bomb,
    "AVIF": avif_without_data,
    "BLP": blp,
}


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("name", STUMBLES)
def test_whatever_a_decoder_raises_is_one_line(any_format, name, flag):
    allow_any_format(flag)
    refusal(OPENERS["image"], STUMBLES[name]())


def animation():
    first, *others = (Image.fromarray(picture(40, 40, seed=seed)) for seed in range(4))
    return image_file(first, "GIF", save_all=True, append_images=others)


def wave():
    return sound_bytes(sound(0.3, 16000), 16000, "WAV", "PCM_16")


WHOLE = {
    "gif": animation,
    "png": lambda: image_file(picture(48, 48), "PNG"),
    "webp": lambda: image_file(picture(48, 48), "WEBP"),
    "tiff": lambda: image_file(picture(48, 48), "TIFF", compression="tiff_lzw"),
    "jpeg": lambda: image_file(picture(48, 48), "JPEG"),
    "wav": wave,
    "mp3": lambda: sound_bytes(sound(0.3, 16000), 16000, "MP3"),
    "flac": lambda: sound_bytes(sound(0.3, 16000), 16000, "FLAC"),
}


def damaged(data, random):
    """Cut, or with bytes changed, or with a piece twice or missing."""
    data = bytearray(data)
    for _ in range(random.integers(1, 6)):
        at = int(random.integers(0, len(data)))
        length = int(random.integers(1, 64))
        match random.integers(0, 4):
            case 0:
                data[at : at + length] = random.bytes(length)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at] ^= 1 << int(random.integers(0, 8))
    return bytes(data[: random.integers(1, len(data) + 1)] if random.random() < 0.2 else data) or b"x"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_file_is_read_or_refused_in_one_line(name):
    whole, random = WHOLE[name](), np.random.default_rng(0)
    for _ in range(60):
        data = damaged(whole, random)
        for kind, opener in OPENERS.items():
            try:
                medium = opener(data)
                if kind == "video":
                    list(medium.read(range(len(medium.times))))
                elif kind == "audio":
                    list(medium.blocks())
            except ValueError as error:
                assert str(error).startswith((f"{kind}s[0]", "audio[0]")), error  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017


def test_a_wave_of_an_unknown_codec_is_refused_by_name():
    data = bytearray(wave())
    data[20:22] = struct.pack("<H", 0x7A7A)
    assert "an unknown codec" in refusal(OPENERS["audio"], bytes(data))


@pytest.mark.parametrize("error", [IndexError("a\nb"), AttributeError("a"), ZeroDivisionError(), RuntimeError("a")])
def test_whatever_is_raised_while_a_container_is_open_is_one_line(tmp_path, error):
    path = video_file(tmp_path / "a.mp4", clip(4))

    def decode(item):
        with opening.open_container(item, "videos[0]", "video"):
            raise error

    assert repr(error) in refusal(decode, path)


def test_metadata_that_is_no_text_is_no_reason_to_refuse_a_video(tmp_path):
    data = Path(video_file(tmp_path / "a.mp4", clip(4))).read_bytes()
    assert b"Lavf" in data
    assert len(open_video(data.replace(b"Lavf", b"\xff\xfe\xff\xfe"), "videos[0]", 1.0).times) == 4


class Redirect(BaseHTTPRequestHandler):
    target = ""

    def do_GET(self):
        self.send_response(302)
        self.send_header("Location", self.target)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("scheme", ["ftp", "file", "data", "gopher"])
def test_a_download_is_led_to_no_other_protocol(listener, scheme):
    Redirect.target = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/private.png"
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(OSError, match=r"^images\[0\]: expected an answer"):
                load_image(f"http://127.0.0.1:{server.server_port}/a.png", "images[0]", 5)
        finally:
            server.shutdown()
            thread.join()
    assert_nobody_came(listener)


# ---- one place


def test_nothing_else_opens_media():
    """`av.open`, `Image.open` and soundfile, but for those that write, are called by one module."""
    found = []
    for folder in ("processors", "cli", "training", "conversion", "modeling_mimo"):
        for path in (PACKAGE / folder).glob("**/*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                if called in ("av.open", "Image.open", "PIL.Image.open", "soundfile.read", "soundfile.SoundFile"):
                    writes = len(node.args) > 1 and getattr(node.args[1], "value", None) == "w"
                    if not writes:
                        found.append((path.name, called))
    others = [(name, called) for name, called in found if name != "media_opening_mimo_v2.py"]
    # the words of MiMo-Micro, which are the package's own
    assert others == [("micro_sounds.py", "soundfile.read")]
    assert {called for _, called in found} == {"av.open", "Image.open", "soundfile.read", "soundfile.SoundFile"}


# ---- the server


def answer_of(address, part):
    body = json.dumps({"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def data_url(data, mime="application/octet-stream"):
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    (root / "media").mkdir()
    video_file(root / "media" / "open.mp4", clip(FRAMES))
    video_file(root / "private.mp4", clip(FRAMES))
    (root / "media" / "link.mp4").symlink_to(root / "private.mp4")
    return root / "media"


@pytest.fixture(scope="module", params=[True, False], ids=["downloads and a folder", "neither"])
def attacked(request, loaded, media_folder):  # noqa: F811
    policy = MediaPolicy(downloads=request.param, folder=media_folder if request.param else None)
    with running(*loaded["omni"], policy) as address:
        yield address


def test_a_server_reads_no_file_for_a_text_of_a_client(attacked, texts, listener, tmp_path):
    for name, text in texts.items():
        url = data_url(text)
        for kind in ("video_url", "audio_url", "image_url"):
            there = answer_of(attacked, {"type": kind, kind: {"url": url}})
            assert there[0] == 400, (name, kind, there)
            if name == "ffconcat":
                (tmp_path / "private.ts").rename(tmp_path / "away.ts")
                assert answer_of(attacked, {"type": kind, kind: {"url": url}}) == there
                (tmp_path / "away.ts").rename(tmp_path / "private.ts")
    assert_nobody_came(listener)


def test_a_server_opens_no_path_out_of_its_folder(attacked, media_folder):
    private = media_folder.parent / "private.mp4"
    for url in (
        f"file://{private}",
        f"file://{media_folder}/../private.mp4",
        f"file://{media_folder}/%2e%2e/private.mp4",
        f"file://{media_folder}/%2E%2E%2Fprivate.mp4",
        f"file://{media_folder}/link.mp4",
        f"file://localhost{private}",
        f"file:{private}",
        f"FILE://{private}",
        str(private),
        f"concat:{private}",
        f"subfile,,start,0,end,0,,:{private}",
        f"async:file:{private}",
    ):
        status, answer = answer_of(attacked, {"type": "video_url", "video_url": {"url": url}})
        assert status == 400, (url, answer)


def test_the_client_of_openai_still_sends_what_it_may(attacked, media_folder):
    client = openai.OpenAI(base_url=f"{attacked}/v1", api_key="none", max_retries=0)
    urls = {
        "image_url": data_url(image_file(picture(64, 64), "PNG"), "image/png"),
        "video_url": data_url((media_folder / "open.mp4").read_bytes(), "video/mp4"),
        "audio_url": data_url(wave(), "audio/wav"),
    }
    content = [{"type": kind, kind: {"url": url}} for kind, url in urls.items()]
    answer = client.chat.completions.create(
        model="mimo", messages=[{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}], max_tokens=2
    )
    assert answer.usage.completion_tokens == 2
