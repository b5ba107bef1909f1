"""What MiMo-Micro can do, as tasks with checkable answers: drawn anew for every number, for training and for tests.

A scene is a picture, a clip, a sound or a text with all questions that can be asked about it. Training asks them in
one conversation, so that little is computed for many answers; a test asks one.
"""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from . import micro_pictures as pictures
from . import micro_sounds as sounds
from . import micro_texts as texts


SPLITS = ("train", "test")
# sentences between a key and its question that are at least 16 windows of 32 tokens
FAR = 72
# keys in a long text
OWNERS = 6


@dataclass
class Turn:
    """A question about a scene and the answer; `thinking` is what is reasoned before it, None for no thinking."""

    task: str
    question: str
    answer: str
    thinking: str | None = None
    call: dict | None = None

    def messages(self, part: dict | None = None) -> list[dict]:
        content = self.question if part is None else [part, {"type": "text", "text": self.question}]
        reply = {"role": "assistant", "content": "" if self.call else self.answer}
        if self.call:
            reply["tool_calls"] = [self.call]
        if self.thinking is not None:
            reply["reasoning_content"] = self.thinking
        return [{"role": "user", "content": content}, reply]


@dataclass
class Scene:
    """`part`: the medium, as in a message; `text`: what stands before the first question instead."""

    turns: list[Turn]
    part: dict | None = None
    text: str = ""
    tools: list | None = None

    def conversation(self, turns: list[Turn]) -> dict:
        """An example for a `ConversationCollator`."""
        messages = []
        for index, turn in enumerate(turns):
            pair = turn.messages(self.part if index == 0 else None)
            if self.text and index == 0:
                pair[0]["content"] = f"{self.text} {turn.question}"
            messages += pair
        example = {"messages": messages}
        if all(turn.thinking is None for turn in turns):
            example["chat_template_kwargs"] = {"enable_thinking": False}
        return example | ({"tools": self.tools} if self.tools else {})


@dataclass
class Task:
    """`bar`: accuracy that the model is to reach, None where nothing is promised; `chance`: that of guessing."""

    name: str
    kind: str
    scene: Callable[[np.random.Generator, bool], Scene]
    chance: float
    bar: float | None
    about: str
    choices: tuple[str, ...] = field(default=())


def one_thing(random: np.random.Generator, held_out: bool) -> Scene:
    thing = pictures.thing(random, int(random.integers(9)))
    turns = [
        Turn("shape", "What shape is it?", thing.shape),
        Turn("colour", "What colour is it?", thing.colour),
        Turn("where", "Where is it?", thing.place),
        Turn("describe", "Describe the picture.", f"{thing.title} at the {thing.place}."),
    ]
    return Scene(turns, image(pictures.draw([thing], pictures.background(random))))


def some_things(random: np.random.Generator, held_out: bool) -> Scene:
    """Two to five things of different shapes and colours, in different cells."""
    count = int(random.integers(2, 6))
    cells = sorted(random.choice(9, count, replace=False).tolist())
    shapes = random.choice(pictures.SHAPES, count, replace=False)
    colours = random.choice(list(pictures.COLOURS), count, replace=False)
    things = [pictures.thing(random, *one) for one in zip(cells, map(str, shapes), map(str, colours))]
    turns = [Turn("count", "How many shapes are there?", str(count))]
    for chosen in random.permutation(count)[:3]:
        thing = things[chosen]
        turns.append(Turn("pick", f"What colour is the {thing.shape}?", thing.colour))
        turns.append(Turn("find", f"Where is the {thing.colour} shape?", thing.place))
    first, *others = (f"{thing.title} at the {thing.place}" for thing in things)
    others = [f"a{one[1:]}" for one in others]
    answer = f"{', '.join([first, *others[:-1]])} and {others[-1]}."
    turns.append(Turn("describe_two" if count == 2 else "describe_all", "Describe the picture.", answer))
    return Scene(turns, image(pictures.draw(things, pictures.background(random))))


def two_things(random: np.random.Generator, held_out: bool) -> Scene:
    while True:
        scene = some_things(random, held_out)
        if scene.turns[-1].task == "describe_two":
            return scene


def moving_thing(random: np.random.Generator, held_out: bool) -> Scene:
    """A clip of four pairs of frames, 1 to 4 seconds apart; the thing begins to move with the second to fourth."""
    motion = texts.pick(random, list(pictures.MOTIONS))
    pair, step = int(random.integers(1, 4)), int(random.integers(1, 5))
    thing, frames = _clip(random, motion, 2 * pair)
    time = f"00:{pair * step:02d}"
    turns = [
        Turn("motion", "Which way does it move?", motion),
        Turn("when", "When does it begin to move?", time),
        Turn("clip", "What happens?", f"The {thing.name} moves {motion} at {time}."),
    ]
    return Scene(turns, {"type": "video", "video": movie(frames, Fraction(2, step))})


def sounding_thing(random: np.random.Generator, held_out: bool) -> Scene:
    """A clip of four seconds in which a thing moves up or down while a tone rises or falls."""
    motion = texts.pick(random, ("up", "down"))
    rises = bool(random.integers(2))
    _, frames = _clip(random, motion, 2)
    fits = "yes" if (motion == "up") == rises else "no"
    answer = f"It moves {motion} and the tone {'rises' if rises else 'falls'}: {fits}."
    turns = [Turn("match", "Does the sound match the clip?", answer)]
    sound = sounds.glide(random, rises, 4.0)
    return Scene(turns, {"type": "video", "video": movie(frames, Fraction(2), sound)})


def one_note(random: np.random.Generator, held_out: bool) -> Scene:
    name = texts.pick(random, list(sounds.NOTES))
    turns = [Turn("tone", "Which note is it?", name), Turn("hear", "What is heard?", f"The note {name}.")]
    return Scene(turns, audio(sounds.note(random, name)))


def one_word(random: np.random.Generator, held_out: bool) -> Scene:
    word = texts.pick(random, sounds.WORDS)
    turns = [Turn("word", "Which word is it?", word), Turn("hear", "What is heard?", f"The word {word}.")]
    return Scene(turns, audio(sounds.word(random, word, held_out)))


def two_sounds(random: np.random.Generator, held_out: bool) -> Scene:
    """A note and a word, two notes or two words, one after the other."""
    heard, names = [], []
    for _ in range(2):
        if random.integers(2):
            name = texts.pick(random, list(sounds.NOTES))
            heard.append(sounds.note(random, name))
            names.append(f"the note {name}")
        else:
            word = texts.pick(random, sounds.WORDS)
            heard.append(sounds.word(random, word, held_out))
            names.append(f"the word {word}")
    turns = [Turn("order", "What is heard?", f"First {names[0]}, then {names[1]}.")]
    return Scene(turns, audio(sounds.after_another(random, *heard)))


def far_key(random: np.random.Generator, held_out: bool) -> Scene:
    """Keys in a long text. The first one stands at its beginning; in training most texts are shorter."""
    length = FAR if held_out or random.random() < 0.25 else int(2 * (FAR / 2) ** random.random())
    lines = [texts.sentence(random) for _ in range(length)]
    owned = texts.keys(random, OWNERS)
    places = [0, *sorted(random.integers(0, length, len(owned) - 1).tolist())]
    for done, (place, (owner, key)) in enumerate(zip(places, owned.items())):
        lines.insert(place + done, texts.key_sentence(owner, key))
    turns = [Turn("key", f"What is the key of {owner}?", key) for owner, key in owned.items()]
    return Scene(turns, text=" ".join(lines))


def some_sums(random: np.random.Generator, held_out: bool) -> Scene:
    """Sums with thinking."""
    a, b = texts.sum_of(random, held_out)
    return Scene([Turn("sum", f"What is {a} + {b}?", str(a + b), thinking=texts.written_sum(a, b))])


def quick_sums(random: np.random.Generator, held_out: bool) -> Scene:
    """Sums without thinking."""
    pairs = [texts.sum_of(random, held_out) for _ in range(6)]
    return Scene([Turn("quick_sum", f"What is {a} + {b}?", str(a + b)) for a, b in pairs])


def tool_calls(random: np.random.Generator, held_out: bool) -> Scene:
    question, call = texts.tool_call(random)
    function = call["function"]
    answer = f"{function['name']}({function['arguments']['city']})"
    return Scene([Turn("tool", question, answer, call=call)], tools=texts.TOOLS)


def told_story(random: np.random.Generator, held_out: bool) -> Scene:
    return Scene([Turn("story", *texts.story(random))])


def known_fact(random: np.random.Generator, held_out: bool) -> Scene:
    chosen = random.permutation(len(texts.FACTS))[:2]
    return Scene([Turn("fact", *texts.FACTS[index]) for index in chosen])


def _table() -> dict[str, Task]:
    shapes, colours = pictures.SHAPES, tuple(pictures.COLOURS)
    place, note, word = 1 / 9, 1 / len(sounds.NOTES), 1 / len(sounds.WORDS)
    thing = place / len(shapes) / len(colours)
    rows = (
        Task("shape", "image", one_thing, 1 / len(shapes), 0.9, "Name the shape.", shapes),
        Task("colour", "image", one_thing, 1 / len(colours), 0.9, "Name its colour.", colours),
        Task("where", "image", one_thing, place, None, "Name its place on the board.", pictures.PLACES),
        Task("describe", "image", one_thing, thing, 0.8, "Name colour, shape and place of one thing."),
        Task("count", "image", some_things, 1 / 4, None, "Count two to five shapes.", tuple("2345")),
        Task("pick", "image", some_things, 1 / len(colours), 0.8, "Colour of one of several shapes.", colours),
        Task("find", "image", some_things, place, 0.8, "Place of the shape of a colour.", pictures.PLACES),
        Task("describe_two", "image", two_things, thing**2, 0.8, "Colour, shape and place of two things."),
        Task("motion", "video", moving_thing, 1 / 4, 0.9, "Which way a shape moves.", tuple(pictures.MOTIONS)),
        Task("when", "video", moving_thing, 1 / 3, 0.8, "The time stamp at which it begins to move."),
        Task("clip", "video", moving_thing, 1 / 3 / 4 / len(shapes) / len(colours), 0.8, "All of it in a sentence."),
        Task("match", "both", sounding_thing, 1 / 4, 0.8, "Whether a tone rises and falls with a shape."),
        Task("tone", "audio", one_note, note, 0.9, "Name a note.", tuple(sounds.NOTES)),
        Task("word", "audio", one_word, word, None, "Recognize a word, in voices not trained on.", sounds.WORDS),
        Task("order", "audio", two_sounds, ((note + word) / 4) ** 2, 0.8, "Two notes or words, in their order."),
        # any of the keys in the text
        Task("key", "text", far_key, 1 / OWNERS, 0.95, "A key of three digits, 16 windows back."),
        Task("sum", "text", some_sums, 1 / 180, None, "Add two numbers, with thinking."),
        Task("quick_sum", "text", quick_sums, 1 / 180, None, "Add two numbers at once."),
        Task("tool", "text", tool_calls, 1 / 2 / len(texts.CITIES), None, "Call the right tool."),
        Task("story", "text", told_story, 0.0, None, "Tell the story that was asked for, word by word."),
        Task("fact", "text", known_fact, 1 / len(texts.FACTS), None, "Say by heart what was learned."),
    )
    return {task.name: task for task in rows}


TASKS = _table()


def example(task: str, number: int, split: str = "test") -> dict:
    """One question of a task: `messages` with the user's turn alone, `answer`, and what else `apply_chat_template`
    takes: `chat_template_kwargs`, `tools`. The same for the same arguments; splits have no picture, sound or sum in
    common.

    Raises:
        ValueError: a task or split that there is not.
    """
    if task not in TASKS:
        raise ValueError(f"`task`: expected one of {', '.join(TASKS)}, got {task!r}.")
    scene = TASKS[task].scene(_random(task, number, split), split == "test")
    turn = next(turn for turn in scene.turns if turn.task == task)
    asked = scene.conversation([turn])
    return {**asked, "messages": asked["messages"][:1], "reply": asked["messages"][1], "answer": turn.answer}


def is_right(example: dict, response: dict | str) -> bool:
    """Whether a response, as `processor.parse_response` gives it, or its content, is the answer, letter by letter."""
    if isinstance(response, str):
        return response.strip() == example["answer"]
    if "tool_calls" not in example["reply"]:
        return (response.get("content") or "").strip() == example["answer"] and not response.get("tool_calls")
    calls = [call["function"] for call in response.get("tool_calls") or []]
    return calls == [call["function"] for call in example["reply"]["tool_calls"]]


# scene -> how often it is trained on, out of the sum
MIX = {
    one_thing: 17,
    some_things: 19,
    moving_thing: 18,
    sounding_thing: 6,
    one_note: 4,
    one_word: 8,
    two_sounds: 8,
    far_key: 11,
    some_sums: 5,
    quick_sums: 2,
    tool_calls: 1,
    told_story: 4,
    known_fact: 3,
}


def conversation(number: int, split: str = "train") -> dict:
    """Conversation `number` to train on: a scene by the shares of MIX and its questions in a random order."""
    random = _random("conversation", number, split)
    shares = np.array(list(MIX.values()))
    scene = list(MIX)[random.choice(len(MIX), p=shares / shares.sum())](random, split == "test")
    return scene.conversation([scene.turns[index] for index in random.permutation(len(scene.turns))])


def image(pixels: np.ndarray) -> dict:
    return {"type": "image", "image": pixels}


def audio(samples: np.ndarray) -> dict:
    return {"type": "audio", "audio": samples, "sampling_rate": sounds.RATE}


def movie(frames: np.ndarray, rate: Fraction, sound: np.ndarray | None = None) -> bytes:
    """An MP4 file of frames [T, H, W, 3] uint8 at `rate` per second, with `sound` at 24 kHz if there is any."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # FFmpeg can be built without x264
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        pictures_stream = container.add_stream(codec, rate=rate, options={"preset": "veryfast", "crf": "16"})
        pictures_stream.height, pictures_stream.width = frames.shape[1:3]
        pictures_stream.pix_fmt = "yuv420p"
        pictures_stream.thread_count = 1
        sound_stream = None
        if sound is not None:
            sound_stream = container.add_stream("aac", rate=sounds.RATE, layout="mono")
        for pixels in frames:
            container.mux(pictures_stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(pictures_stream.encode())
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate = sounds.RATE
            container.mux(sound_stream.encode(frame))
            container.mux(sound_stream.encode())
    return file.getvalue()


def _clip(random: np.random.Generator, motion: str, begin: int) -> tuple[pictures.Thing, np.ndarray]:
    """A thing that has room for its motion, and its frames."""
    down, right = pictures.MOTIONS[motion]
    free = {-1: (1, 3), 0: (0, 3), 1: (0, 2)}
    row, column = int(random.integers(*free[down])), int(random.integers(*free[right]))
    along = row if down else column
    room = 2 - along if down + right > 0 else along
    thing = pictures.thing(random, 3 * row + column)
    distance = pictures.CELL * int(random.integers(1, room + 1))
    return thing, pictures.clip(thing, motion, begin, distance, pictures.background(random))


def _random(name: str, number: int, split: str) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"`split`: expected one of {', '.join(SPLITS)}, got {split!r}.")
    return np.random.default_rng([zlib.crc32(name.encode()), SPLITS.index(split), number])


__all__ = ["MIX", "SPLITS", "TASKS", "Scene", "Task", "Turn", "conversation", "example", "is_right", "movie"]
