r"""The description of a folder of weights split over tensor-, expert- and pipeline-parallel ranks: strict JSON.

    {
      "files": ["rank_tp{tp}_ep{ep}_pp{pp}.pt"],
      "ranks": {"tp": 4, "ep": 8, "pp": 2},
      "ignore": ["^optimizer\\.", "^iteration$", "_extra_state$"],
      "rename": [["^model\\.decoder\\.", "model."], ["^model\\.output_layer\\.", "lm_head."]],
      "indices": [
        {"names": "^model\\.layers\\.(\\d+)\\.", "rank": "pp", "per_rank": [24, 24]},
        {"names": "\\.experts\\.(\\d+)\\.", "rank": "ep", "per_rank": 32}
      ],
      "rules": [
        {"names": "\\.o_proj\\.|\\.down_proj\\.", "join": "columns"},
        {"names": "_proj\\.|embed_tokens|lm_head|attention_sink_bias", "join": "rows"},
        {"names": "norm\\.|mlp\\.gate\\.", "join": "same"}
      ]
    }

The released expert-parallel files are the simplest case: names are global and no tensor is cut.

    {"files": ["model_pp0_ep{ep}_shard{shard}.safetensors", "model_mtp.safetensors"], "ranks": {"ep": 8}}

The keys, in the order in which they act:

- `files`: one pattern per kind of file, relative to the folder. `{tp}`, `{ep}`, `{pp}` are the numbers of the rank
  from 0, `{shard}` numbers the files of one rank. Files of a pattern without `{tp}` hold uncut tensors.
- `ranks`: how many ranks there are of each. All of their files must be there.
- `ignore`: what to leave out: entries by their name in the file, other files with weights by their path. Everything
  else in the files must be a tensor.
- `rename`: pairs of a pattern and its replacement, applied in turn, until released names are left.
- `indices`: the group of `names` is a number that a rank counts from 0; what the ranks before it have is added.
- `rules`: how the parts of the TP ranks become one tensor. The first rule that matches decides, for a scale the one
  of its weight. `rows`, `columns`: concatenated in the order of ranks. `same`: on all ranks, equal bit for bit.
  `one`: on one rank. `first`: on all ranks, the first one's is taken and the others are not compared.

Patterns are Python's regular expressions, searched anywhere in the name.
"""

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


AXES = ("tp", "ep", "pp")
JOINS = ("rows", "columns", "same", "one", "first")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

MAX_LAYOUT_BYTES = 2**20
MAX_RANKS = 2**16


class IndexRule(NamedTuple):
    """Group 1 of `names` counts from 0 on every rank; `per_rank` says how many each of them has."""

    names: re.Pattern
    rank: str
    per_rank: tuple[int, ...]


class JoinRule(NamedTuple):
    """How the TP ranks' parts of the tensors that `names` matches become one, out of `JOINS`."""

    names: re.Pattern
    join: str


@dataclass(frozen=True)
class RankLayout:
    """See the module's docstring; `read_rank_layout` makes it."""

    files: tuple[str, ...]
    ranks: dict[str, int]
    ignore: tuple[re.Pattern, ...] = ()
    rename: tuple[tuple[re.Pattern, str], ...] = ()
    indices: tuple[IndexRule, ...] = ()
    rules: tuple[JoinRule, ...] = ()

    def is_ignored(self, name: str) -> bool:
        """Whether an entry, by its name in the file, or a file, by its path in the folder, is left out."""
        return any(pattern.search(name) for pattern in self.ignore)

    def released_name(self, name: str, rank: dict[str, int]) -> str:
        """The released name of a tensor that is called `name` on `rank`, e.g. `{"tp": 0, "ep": 3}`.

        ValueError: an index rule matches something that is no number or more than a rank has.
        """
        for pattern, replacement in self.rename:
            name = pattern.sub(replacement, name)
        for rule in self.indices:
            match = rule.names.search(name)
            if match is None or rule.rank not in rank:
                continue
            number = rank[rule.rank]
            if not (match[1] or "").isdecimal() or int(match[1]) >= rule.per_rank[number]:
                raise ValueError(
                    f"{name}: expected a number below {rule.per_rank[number]} in {rule.names.pattern!r} "
                    f"on {rule.rank} rank {number}, got {match[1]!r}."
                )
            index = int(match[1]) + sum(rule.per_rank[:number])
            name = f"{name[: match.start(1)]}{index}{name[match.end(1) :]}"
        return name

    def join_of(self, name: str) -> str | None:
        """What the first rule that matches a released name says, None if none does; a scale goes as its weight."""
        weight = name.removesuffix("_inv").removesuffix("_scale")
        return next((rule.join for rule in self.rules if rule.names.search(weight)), None)


def read_rank_layout(path: str | Path) -> RankLayout:
    """The layout description in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown or missing key, a wrong type, a bad pattern; one line that names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a rank layout in JSON, got nothing there.")
    if path.stat().st_size > MAX_LAYOUT_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_LAYOUT_BYTES} bytes, got {path.stat().st_size}.")
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}.") from None
    try:
        return _parse(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a key twice among {[key for key, _ in pairs]}")
    return result


def _parse(values: Any) -> RankLayout:
    optional = ("ignore", "rename", "indices", "rules")
    _check_keys("the layout", values, ("files", "ranks"), optional)
    ranks = _parse_ranks(values["ranks"])
    lists = {key: _list(f"`{key}`", values.get(key, [])) for key in optional}
    return RankLayout(
        files=_parse_files(values["files"], ranks),
        ranks=ranks,
        ignore=tuple(_pattern(f"`ignore[{index}]`", item) for index, item in enumerate(lists["ignore"])),
        rename=tuple(_parse_rename(f"`rename[{index}]`", item) for index, item in enumerate(lists["rename"])),
        indices=tuple(_parse_index(f"indices[{index}]", item, ranks) for index, item in enumerate(lists["indices"])),
        rules=tuple(_parse_rule(f"rules[{index}]", item) for index, item in enumerate(lists["rules"])),
    )


def _parse_ranks(value: Any) -> dict[str, int]:
    _check_keys("`ranks`", value, (), AXES)
    for axis, count in value.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"`ranks.{axis}`: expected a positive int, got {_shown(count)}.")
    if math.prod(value.values()) > MAX_RANKS:
        raise ValueError(f"`ranks`: expected at most {MAX_RANKS} in all, got {math.prod(value.values())}.")
    return value


def _parse_files(value: Any, ranks: dict[str, int]) -> tuple[str, ...]:
    used = set()
    for index, pattern in enumerate(_list("`files`", value)):
        where = f"`files[{index}]`"
        if not isinstance(pattern, str) or not pattern.endswith(SUFFIXES):
            raise ValueError(f"{where}: expected a name ending in {', '.join(SUFFIXES)}, got {_shown(pattern)}.")
        if any(part in ("", ".", "..") for part in pattern.split("/")) or any(mark in pattern for mark in "\\:\0"):
            raise ValueError(f"{where}: expected a path inside the folder, got {pattern!r}.")
        fields = re.findall(r"\{(.*?)\}", pattern)
        known = [f"{{{field}}}" for field in (*ranks, "shard")]
        if set(fields) - {*ranks, "shard"} or len(fields) != len(set(fields)):
            raise ValueError(f"{where}: expected each of {', '.join(known)} at most once, got {pattern!r}.")
        used.update(fields)
    if not value or set(ranks) - used:
        missing = [f"{{{field}}}" for field in ranks if field not in used]
        raise ValueError(f"`files`: expected a pattern{' with ' + ', '.join(missing) if missing else ''}, got none.")
    return tuple(value)


def _parse_rename(where: str, value: Any) -> tuple[re.Pattern, str]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], str):
        raise ValueError(f"{where}: expected a pair of a pattern and its replacement, got {_shown(value)}.")
    pattern = _pattern(where, value[0])
    try:
        pattern.sub(value[1], "")
    except (re.error, IndexError) as error:
        raise ValueError(f"{where}: expected a replacement that fits the pattern, got {error}.") from None
    return pattern, value[1]


def _parse_index(where: str, value: Any, ranks: dict[str, int]) -> IndexRule:
    _check_keys(f"`{where}`", value, ("names", "rank", "per_rank"))
    names = _pattern(f"`{where}.names`", value["names"])
    if names.groups != 1:
        raise ValueError(f"`{where}.names`: expected one group around the number, got {names.groups}.")
    rank = _choice(f"`{where}.rank`", value["rank"], ranks)
    per_rank = value["per_rank"]
    numbers = per_rank if isinstance(per_rank, list) else [per_rank] * ranks[rank]
    if len(numbers) != ranks[rank] or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"`{where}.per_rank`: expected an int or {ranks[rank]} of them, got {_shown(per_rank)}.")
    return IndexRule(names, rank, tuple(numbers))


def _parse_rule(where: str, value: Any) -> JoinRule:
    _check_keys(f"`{where}`", value, ("names", "join"))
    return JoinRule(_pattern(f"`{where}.names`", value["names"]), _choice(f"`{where}.join`", value["join"], JOINS))


def _check_keys(where: str, value: Any, required: Collection[str], optional: Collection[str] = ()) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {_shown(value)}.")
    for key in value:
        if key not in required and key not in optional:
            raise ValueError(f"{where}: expected keys out of {', '.join((*required, *optional))}, got {key!r}.")
    for key in required:
        if key not in value:
            raise ValueError(f"{where}: expected the key {key!r}, got none.")


def _choice(where: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{where}: expected one of {', '.join(choices)}, got {_shown(value)}.")
    return value


def _list(where: str, value: Any) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {_shown(value)}.")
    return value


def _pattern(where: str, value: Any) -> re.Pattern:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a regular expression, got {_shown(value)}.")
    try:
        return re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: expected a regular expression, got {value!r} ({error}).") from None


def _shown(value: Any) -> str:
    return repr(value)[:80]
