"""Sounds of MiMo-Micro's tasks: musical notes, words in espeak-ng's voices, and tones that rise or fall."""

from functools import lru_cache
from importlib.resources import files

import numpy as np


RATE = 24000
# Hz of the octave above middle C, equal temperament
NOTES = {"C": 523.25, "D": 587.33, "E": 659.26, "F": 698.46, "G": 783.99, "A": 880.0, "B": 987.77}
WORDS = ("cat", "dog", "bird", "house", "water", "music", "seven", "yes")

# voices in each file of words, and how many of them, the last ones, are never trained on
VOICES, HELD_OUT = 24, 6
# seconds of a file of words that belong to each voice
SLOT = 0.9

# strengths of the first harmonics of each kind of instrument
_TIMBRES = ((1.0,), (1.0, 0.5, 0.25), (1.0, 0.0, 0.5, 0.0, 0.3), (1.0, 0.7, 0.5, 0.35))


def note(random: np.random.Generator, name: str) -> np.ndarray:
    """[samples] float32, 0.5 to 0.9 seconds of a note, slightly out of tune, of a random instrument."""
    times = np.arange(int(random.uniform(0.5, 0.9) * RATE)) / RATE
    frequency = NOTES[name] * 2 ** (random.uniform(-0.15, 0.15) / 12)
    strengths = _TIMBRES[random.integers(len(_TIMBRES))]
    sound = sum(s * np.sin(2 * np.pi * frequency * (i + 1) * times) for i, s in enumerate(strengths))
    # held like an organ's, or fading like a piano's
    sound = sound * np.exp(-times * random.choice([0.0, 2.0, 4.0]))
    return _finished(random, sound)


def word(random: np.random.Generator, text: str, held_out: bool) -> np.ndarray:
    """[samples] float32 of a word in one of the voices to train on, or of those held out."""
    voice = random.integers(VOICES - HELD_OUT, VOICES) if held_out else random.integers(VOICES - HELD_OUT)
    slot = int(SLOT * RATE)
    sound = _recordings(text)[voice * slot : (voice + 1) * slot]
    # a little slower or faster, and so lower or higher
    places = np.arange(0, len(sound) - 1, random.uniform(0.9, 1.1))
    sound = np.interp(places, np.arange(len(sound)), sound)
    spoken = np.flatnonzero(np.abs(sound) > 0.01)[-1] + 1
    return _finished(random, sound[: max(spoken, int(0.3 * RATE))])


def glide(random: np.random.Generator, rises: bool, seconds: float) -> np.ndarray:
    """[samples] float32 of a tone that goes up or down all the time, by about an octave."""
    low, high = random.uniform(350, 500), random.uniform(800, 1100)
    start, end = (low, high) if rises else (high, low)
    frequencies = np.geomspace(start, end, int(seconds * RATE))
    return _finished(random, np.sin(2 * np.pi * np.cumsum(frequencies) / RATE))


def after_another(random: np.random.Generator, *sounds: np.ndarray) -> np.ndarray:
    """The sounds with pauses of 0.1 to 0.3 seconds between them."""
    parts = [sounds[0]]
    for sound in sounds[1:]:
        parts += [np.zeros(int(random.uniform(0.1, 0.3) * RATE), np.float32), sound]
    return np.concatenate(parts)


def _finished(random: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """Of a random loudness, with soft ends and faint noise."""
    ramp = np.minimum(1, np.minimum(np.arange(len(sound)), np.arange(len(sound))[::-1]) / (0.01 * RATE))
    sound = sound / np.abs(sound).max() * ramp * random.uniform(0.3, 0.9)
    return (sound + random.normal(0, random.uniform(0.0005, 0.003), len(sound))).astype(np.float32)


@lru_cache
def _recordings(text: str) -> np.ndarray:
    import soundfile

    with (files("modeling_mimo") / "data" / "words" / f"{text}.ogg").open("rb") as file:
        return soundfile.read(file, dtype="float32")[0]


__all__ = ["HELD_OUT", "NOTES", "RATE", "SLOT", "VOICES", "WORDS", "after_another", "glide", "note", "word"]
