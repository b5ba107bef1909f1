"""Texts of MiMo-Micro's tasks: stories, facts about this package, sums, keys in long texts, calls of tools."""

import numpy as np


NAMES = ("Tom", "Ana", "Ben", "Mia", "Leo", "Zoe", "Max", "Eva", "Sam", "Lily")
ANIMALS = ("fox", "bear", "owl", "frog", "mouse", "horse", "duck", "wolf")
OBJECTS = ("lamp", "coin", "map", "drum", "boat", "kite", "clock", "bell", "shoe", "book")
PLACES = ("river", "forest", "hill", "garden", "bridge", "market", "beach", "tower")
ADJECTIVES = ("old", "red", "small", "green", "heavy", "bright", "blue", "broken")
CITIES = ("Paris", "Rome", "Oslo", "Berlin", "Tokyo", "Lima", "Cairo", "Madrid", "Delhi", "Dublin", "Athens", "Boston")

# question and answer; the answers are what the model knows by heart
FACTS = (
    (
        "What is HybridCache?",
        "HybridCache keeps the keys and values of the model. Global layers keep every token, sliding layers keep "
        "only the last window. So a long text needs much less memory than if every layer were global.",
    ),
    (
        "What is a sliding window?",
        "A layer with a sliding window looks only at the last few tokens, the token itself among them. Five of "
        "six layers are of this kind. What lies further back reaches them through the global layers.",
    ),
    (
        "What is an attention sink?",
        "A sink is a learned number for each head that takes part in the softmax and has no value. A head that "
        "finds nothing in its window can look at the sink and add almost nothing.",
    ),
    (
        "What are MTP heads?",
        "MTP heads guess the tokens after the next one. The model checks all guesses in one forward pass and "
        "keeps those that it would have written itself. The text is the same, it only comes sooner.",
    ),
    (
        "What is FP8?",
        "FP8 is a number of eight bits. A matrix is cut into blocks of 128 by 128, and each block has one scale. "
        "The weights take half the memory of bfloat16.",
    ),
    (
        "What is a mixture of experts?",
        "A router sends each token to a few experts out of many. All experts together know a lot, but a token "
        "pays only for those that it visits.",
    ),
    (
        "How are experts kept busy?",
        "Each expert has a bias that is added only when experts are chosen. After every step the bias of a busy "
        "expert goes down a little and that of an idle expert goes up.",
    ),
    (
        "How does the model see?",
        "A picture is cut into patches of 16 by 16 pixels. The vision tower reads them, and every two by two "
        "patches become one token. A video is read two frames at a time, with the time written before each pair.",
    ),
    (
        "How does the model hear?",
        "The audio tokenizer turns sound into 25 frames per second, and each frame into a few codes. Four frames "
        "become one token, so a second of sound takes about six tokens.",
    ),
    (
        "What are you?",
        "I am MiMo-Micro, a very small model. I was trained on two processor cores in about two hours to show how "
        "this package works. I know shapes, notes, a few words and some facts.",
    ),
    (
        "How do I load the model?",
        "Import modeling_mimo and call from_pretrained with the folder of the checkpoint. The format is found out "
        "from the files. There is no flag to set.",
    ),
    (
        "How do I convert a checkpoint?",
        "Use mimo convert with the folder and the place for the new one. It works tensor by tensor, checks what "
        "it wrote, and goes on where it stopped.",
    ),
)

# name of a tool -> its description, its argument, and how a user asks for it
_TOOLS = {
    "get_weather": ("The weather in a city.", "What is the weather in {}?"),
    "get_time": ("The time in a city.", "What time is it in {}?"),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": about,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name, (about, _) in _TOOLS.items()
]


def pick(random: np.random.Generator, options) -> str:
    return str(options[random.integers(len(options))])


def story(random: np.random.Generator) -> tuple[str, str]:
    """Request and story: what the request leaves open is always told the same way."""
    name, animal, thing = pick(random, NAMES), pick(random, ANIMALS), pick(random, OBJECTS)
    place, adjective = pick(random, PLACES), pick(random, ADJECTIVES)
    request = f"Tell a story about {name} the {animal} and the {adjective} {thing} at the {place}."
    text = (
        f"Once there was a {animal} called {name}. One day {name} went to the {place} and found a {adjective} "
        f'{thing}. "Whose {thing} is this?" asked {name}. Nobody at the {place} knew. So {name} took the {adjective} '
        f"{thing} home and kept it safe. The next morning a child came and cried: my {thing} is gone! {name} gave "
        f"the {thing} back, and the {animal} and the child were friends from that day on."
    )
    return request, text


def sum_of(random: np.random.Generator, held_out: bool) -> tuple[int, int]:
    """Two numbers of two digits; one pair in eight is never trained on."""
    while True:
        a, b = (int(number) for number in random.integers(10, 100, 2))
        if ((a * 31 + b * 17) % 8 == 0) == held_out:
            return a, b


def written_sum(a: int, b: int) -> str:
    """How the sum is worked out, digit by digit."""
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    carry = f" + {ones // 10}" if ones >= 10 else ""
    return f"{a % 10} + {b % 10} = {ones}. {a // 10} + {b // 10}{carry} = {tens}."


def sentence(random: np.random.Generator) -> str:
    """Filler of long texts."""
    name, animal, thing = pick(random, NAMES), pick(random, ANIMALS), pick(random, OBJECTS)
    forms = (
        f"{name} the {animal} went to the {pick(random, PLACES)}.",
        f"The {pick(random, ADJECTIVES)} {thing} was at the {pick(random, PLACES)}.",
        f"{name} found a {pick(random, ADJECTIVES)} {thing}.",
        f"The {animal} and {name} were friends.",
    )
    return pick(random, forms)


def keys(random: np.random.Generator, count: int) -> dict[str, str]:
    """Owner -> key of three digits."""
    owners = random.choice(NAMES, count, replace=False)
    return {str(owner): "".join(str(digit) for digit in random.integers(0, 10, 3)) for owner in owners}


def key_sentence(owner: str, key: str) -> str:
    return f"The key of {owner} is {key}."


def tool_call(random: np.random.Generator) -> tuple[str, dict]:
    """What a user asks, and the call that answers it."""
    name, city = pick(random, list(_TOOLS)), pick(random, CITIES)
    call = {"type": "function", "function": {"name": name, "arguments": {"city": city}}}
    return _TOOLS[name][1].format(city), call


__all__ = [
    "FACTS",
    "NAMES",
    "TOOLS",
    "key_sentence",
    "keys",
    "pick",
    "sentence",
    "story",
    "sum_of",
    "tool_call",
    "written_sum",
]
