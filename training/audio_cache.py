"""Codes of sounds made once: the audio tokenizer is frozen, so they are the same in every epoch."""

import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from modeling_mimo.messages_mimo_v2 import plain_message


# keys of an audio part that name a file; other sources are encoded each time
_PATH_KEYS = ("audio", "url", "path")
# settings of an audio part; the codes are what they lead to
_OPTIONS = ("start", "end", "sampling_rate")


class AudioCodeCache:
    """Replaces the sound files of conversations by their codes, which are kept in a folder.

    A file is known by its path, size and time of change, and by `start` and `end` of the part. Sound of videos is not
    kept: how its codes are cut depends on the frames.

    Args:
        processor: of the checkpoint, whose `get_audio_codes` makes the codes.
        folder: where to keep them, one safetensors file per sound; made if it is not there.

    ```python
    >>> cache = AudioCodeCache(processor, "codes")
    >>> messages = cache(messages)
    ```
    """

    def __init__(self, processor, folder: str | os.PathLike):
        self.processor, self.folder = processor, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, messages: list[dict]) -> list[dict]:
        """A copy of `messages` whose parts with sound files hold codes. Raises what `get_audio_codes` raises."""
        plain = [plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
        for message in plain:
            if isinstance(message.get("content"), list):
                message["content"] = [self._with_codes(part) for part in message["content"]]
        return plain

    def _with_codes(self, part):
        file = self._file(part)
        if file is None:
            return part
        options = {name: part[name] for name in ("start", "end") if part.get(name) is not None}
        status = file.stat()
        source = [str(file.resolve()), status.st_size, status.st_mtime_ns, options]
        kept = self.folder / f"{hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()}.safetensors"
        if not kept.exists():
            (codes,) = self.processor.get_audio_codes(str(file), **options)
            # renamed, so that workers that meet do not read half a file
            partial = kept.with_suffix(f".{os.getpid()}.partial")
            save_file({"audio_codes": codes.contiguous()}, partial)
            os.replace(partial, kept)
        # a key that is not known stays, for the processor to say so
        rest = {key: value for key, value in part.items() if key not in (*_PATH_KEYS, *_OPTIONS)}
        return {**rest, "audio": {"audio_codes": load_file(kept)["audio_codes"]}}

    @staticmethod
    def _file(part) -> Path | None:
        if part.get("type") != "audio":
            return None
        sources = [part[key] for key in _PATH_KEYS if isinstance(part.get(key), (str, os.PathLike))]
        if len(sources) != 1 or len(os.fspath(sources[0])) > 4096:
            return None
        file = Path(sources[0])
        return file if file.is_file() else None


__all__ = ["AudioCodeCache"]
