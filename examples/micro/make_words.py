"""Speaks the words that MiMo-Micro hears, in many voices: writes modeling_mimo/data/words/WORD.ogg. Needs espeak-ng.

    python examples/micro/make_words.py [FOLDER]

Each file holds one word in VOICES voices, one every SLOT seconds; the last HELD_OUT voices are for tests alone.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

from modeling_mimo.training.micro_sounds import HELD_OUT, RATE, SLOT, VOICES, WORDS


OUT = Path(__file__).resolve().parents[2] / "modeling_mimo" / "data" / "words"
LANGUAGES = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
SPEAKERS = ("m1", "f1", "m3", "f2", "m5", "f4", "m7", "croak")


def voice(index: int) -> list[str]:
    """Options of espeak-ng for a voice: each is another mix of accent, speaker, pitch and speed."""
    name = f"{LANGUAGES[index % len(LANGUAGES)]}+{SPEAKERS[(index + index // 6) % len(SPEAKERS)]}"
    return ["-v", name, "-p", str(30 + 40 * (index * 7 % 11) // 10), "-s", str(130 + 60 * (index * 5 % 7) // 6)]


def speak(word: str, index: int, folder: Path) -> np.ndarray:
    """[slot] float32 at RATE: the word without the silence around it, and silence up to the slot."""
    file = folder / "word.wav"
    subprocess.run(["espeak-ng", *voice(index), "-w", str(file), word], check=True)
    samples, rate = soundfile.read(file, dtype="float32")
    samples = soxr.resample(samples, rate, RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1][: int(SLOT * RATE)]
    samples = samples / np.abs(samples).max() * 0.7
    return np.pad(samples, (0, int(SLOT * RATE) - len(samples)))


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for word in WORDS:
            sound = np.concatenate([speak(word, index, Path(scratch)) for index in range(VOICES)])
            soundfile.write(folder / f"{word}.ogg", sound, RATE, format="OGG", subtype="VORBIS")
    print(f"{folder}: {len(WORDS)} words in {VOICES} voices, of which {HELD_OUT} are held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
