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
"""Names that nobody reads, told to the user with the known name that is nearest."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable

from transformers.cache_utils import Cache


def unknown_name(name: str, known: Iterable[str], what: str) -> str:
    """The message of an error about `name`, which is none of `known`.

    Args:
        what: what was expected in its place, e.g. `an argument of the processor`.
    """
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    suggestion = f"; did you mean `{nearest[0]}`?" if nearest else ""
    return f"`{name}`: expected {what}, got an unknown name{suggestion}"


def refuses_unknown_names(*passed_on: str) -> Callable[[Callable], Callable]:
    """Decorates a function whose `**kwargs` would swallow what nobody reads.

    Args:
        passed_on: names that `**kwargs` may hold.

    Returns:
        A decorator; the function then raises a `ValueError` for an argument of another name, and for a cache that
        comes as anything but `cache`, or a `cache` that is none. None counts as no argument.
    """

    def decorate(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters)
        known = frozenset((*parameters, *passed_on)) - {"self", "kwargs"}

        @functools.wraps(function)
        def checked(*args, **kwargs):
            for name, value in (*zip(parameters, args), *kwargs.items()):
                if name == "self" or value is None:
                    continue
                if name not in known:
                    raise ValueError(unknown_name(name, known, f"an argument of `{function.__qualname__}`"))
                if name != "cache" and isinstance(value, Cache):
                    raise ValueError(f"`{name}`: expected no cache, which goes into `cache`, got one.")
                if name == "cache" and not isinstance(value, Cache):
                    raise ValueError(f"`cache`: expected a Cache of Transformers, got {type(value).__name__}.")
            return function(*args, **kwargs)

        return checked

    return decorate
