"""Stands for a script of Transformers that is not in its source distribution: media of the Hub as files.

The shipped example media take their places, so that nothing is downloaded.
"""

from pathlib import Path


MEDIA = Path(__file__).resolve().parents[2] / "examples" / "media"
KINDS = {
    (".jpg", ".jpeg", ".png"): "chart.png",
    (".mp4", ".avi", ".mkv", ".webm"): "clip_with_sound.mp4",
    (".wav", ".mp3", ".flac", ".ogg"): "speech.wav",
}


def url_to_local_path(url: str) -> str:
    """The example file of the kind that `url` names.

    Raises:
        ValueError: a URL of another kind.
    """
    for endings, name in KINDS.items():
        if url.lower().endswith(endings):
            return str(MEDIA / name)
    raise ValueError(f"url: expected an image, a video or a sound, got {url}.")
