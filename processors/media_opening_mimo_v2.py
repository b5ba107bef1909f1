# Copyright 2026 The modeling-mimo authors.
#
# Licensed under the MIT License (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://opensource.org/license/mit
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The one place that opens media of others: by their bytes, from lists of formats, without any other file or network.

FFmpeg and Pillow guess what a file is. Among what they know are texts that name other files (playlists, concat, SDP,
DASH), numbered files, subtitles, and formats that other programs decode. None of that is opened, from no source.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import av
import soundfile
from av.container import InputContainer
from av.stream import Stream
from PIL import Image, UnidentifiedImageError


# by Pillow; JPEG includes MPO
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# by libsndfile
SOUND_FORMATS = ("AIFF", "AU", "CAF", "FLAC", "MP3", "OGG", "RF64", "W64", "WAV", "WAVEX")
# how these begin; MP3 without a tag with 11 bits of a frame
SOUND_MAGIC = re.compile(
    rb"FORM....AIF[FC]|RIF[FX]....WAVE|RF64|riff|\.snd|dns\.|caff|fLaC|OggS|ID3|\xff[\xe0-\xff]", re.DOTALL
)
# demuxers of FFmpeg, all of which need one file alone; raw streams behind those with an index
CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif", "ivf"),
    *("wav", "w64", "aiff", "au", "caf", "flac", "mp3", "aac", "ac3", "eac3", "dts", "amr"),
    *("h264", "hevc", "obu", "mpegvideo", "m4v"),
)
# decoders of FFmpeg, those of subtitles not among them
CODECS = (
    *("h264", "hevc", "vvc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "theora", "vp6f"),
    *("mpeg1video", "mpeg2video", "mpegvideo", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263", "h263p", "flv"),
    *("wmv1", "wmv2", "wmv3", "vc1", "mjpeg", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "utvideo"),
    *("rawvideo", "png", "gif", "qtrle", "dvvideo"),
    *("aac", "aac_latm", "mp3", "mp3float", "mp2", "mp2float", "mp1", "mp1float", "opus", "libopus", "vorbis"),
    *("libvorbis", "flac", "alac", "wavpack", "ac3", "eac3", "dca", "truehd", "mlp", "amrnb", "amrwb"),
    *("libopencore_amrnb", "libopencore_amrwb", "libspeex", "speex", "wmav1", "wmav2", "wmapro", "wmalossless"),
    *("gsm", "gsm_ms", "adpcm_ms", "adpcm_ima_wav", "adpcm_ima_qt", "adpcm_swf", "pcm_alaw", "pcm_mulaw", "pcm_u8"),
    *("pcm_s8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_s32be", "pcm_f32le"),
    *("pcm_f32be", "pcm_f64le", "pcm_f64be", "pcm_bluray", "pcm_dvd"),
)
# what FFmpeg gets with every file; its protocols are matched by name, and none is called that
FFMPEG_OPTIONS = {
    "protocol_whitelist": "none",
    "format_whitelist": ",".join(CONTAINERS),
    "codec_whitelist": ",".join(CODECS),
}
# bytes that FFmpeg asks Python for at a time
READ_SIZE = 2**20

_any_format = False


class UnknownSound(ValueError):
    """A file that libsndfile does not read, or that is of none of SOUND_FORMATS."""


def allow_any_format(allowed: bool = True) -> None:
    """Opens in this process whatever FFmpeg, libsndfile and Pillow recognize, instead of the formats of this module.

    Only for files that you trust: some of these formats name other files and addresses, which are then opened, or
    start other programs.
    """
    global _any_format
    _any_format = allowed


def file_of(source: str | io.BytesIO) -> io.RawIOBase | io.BytesIO:
    """A reader of the bytes with a position of its own, and no name to guess from; `source`: as of `open_source`."""
    if not isinstance(source, str):
        return io.BytesIO(source.getvalue())
    file = io.FileIO(source)
    file.name = "<none>"
    return file


def source_name(source: str | io.BytesIO) -> str:
    return repr(source) if isinstance(source, str) else f"{source.getbuffer().nbytes} bytes"


@contextmanager
def open_container(source: str | io.BytesIO, name: str, kind: str) -> Iterator[tuple[InputContainer, Stream | None]]:
    """A file that FFmpeg reads, and its best stream of that kind, which can be decoded; None if it has none.

    Args:
        source: as `open_source` gives it.
        name: what errors call the medium, e.g. `videos[0]`.
        kind: "audio" or "video".

    Raises:
        ValueError: no such file, or, whatever FFmpeg raises within the context, a broken one.
    """
    expected = f"a whole {'video' if kind == 'video' else 'audio or video'} file"
    try:
        with _demuxed(source, name, expected) as container:
            stream = container.streams.best(kind)
            if stream is not None:
                _check_codec(stream, name)
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{name}: expected {expected}, got {source_name(source)} ({error.strerror})") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: expected {expected}, got {source_name(source)} ({error!r})") from error


@contextmanager
def _demuxed(source: str | io.BytesIO, name: str, expected: str) -> Iterator[InputContainer]:
    if _any_format:
        with av.open(source if isinstance(source, str) else file_of(source), metadata_errors="replace") as container:
            yield container
        return
    with file_of(source) as file:
        try:
            container = av.open(
                file, container_options=FFMPEG_OPTIONS, buffer_size=READ_SIZE, metadata_errors="replace"
            )
        except av.ArgumentError:
            raise ValueError(
                f"{name}: expected {expected} in a container that is opened (MP4, MOV, MKV, WebM, AVI, ...), "
                f"got {source_name(source)} in another one; `allow_any_format` opens it, if you trust it"
            ) from None
        with container:
            yield container


def _check_codec(stream: Stream, name: str) -> None:
    context = stream.codec_context
    # FFmpeg has no decoder for what it does not know
    codec = "an unknown codec" if context is None else context.codec.name
    if context is None or (codec not in CODECS and not _any_format):
        raise ValueError(f"{name}: expected {stream.type} in a codec that is opened (H.264, AAC, ...), got {codec}")


@contextmanager
def open_sound(source: str | io.BytesIO) -> Iterator[soundfile.SoundFile]:
    """A file that libsndfile reads. Raises UnknownSound if it does not."""
    with file_of(source) as file:
        head = file.read(12)
        file.seek(0)
        if not (_any_format or SOUND_MAGIC.match(head)):
            raise UnknownSound(source_name(source))
        try:
            sound = soundfile.SoundFile(file)
        # TypeError: the wrapper asks for the format of `.raw` files
        except (soundfile.LibsndfileError, TypeError) as error:
            raise UnknownSound(source_name(source)) from error
        with sound:
            # a tag may lie ahead of any format
            if not (_any_format or sound.format in SOUND_FORMATS):
                raise UnknownSound(source_name(source))
            yield sound


def open_picture(source: str | io.BytesIO, name: str, formats: tuple[str, ...] | None = None) -> Image.Image | None:
    """Reads the header of an image file; None if it is none of `formats`, or of IMAGE_FORMATS. ValueError: a broken or
    an unreasonably large one."""
    if formats is None and not _any_format:
        Image.init()
        # Pillow can be older than a format
        formats = tuple(format for format in IMAGE_FORMATS if format in Image.OPEN)
    try:
        with warnings.catch_warnings():
            # between once and twice its limit Pillow only warns
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(source, formats=formats)
    except UnidentifiedImageError:
        return None
    except MemoryError:
        raise
    except Exception as error:
        raise broken_picture(error, name) from None


@contextmanager
def whole_picture(name: str) -> Iterator[None]:
    """Whatever a decoder raises within is a ValueError: decoders of rare formats stumble in their own ways."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise broken_picture(error, name) from None


def broken_picture(error: Exception, name: str) -> ValueError:
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return ValueError(
            f"{name}: expected an image of at most {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS), "
            "got more: a decompression bomb?"
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name}: expected a whole image, got a broken one ({reason})")
