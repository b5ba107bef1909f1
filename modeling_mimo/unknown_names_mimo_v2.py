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
from collections.abc import Iterable


def unknown_name(name: str, known: Iterable[str], what: str) -> str:
    """The message of an error about `name`, which is none of `known`.

    Args:
        what: what was expected in its place, e.g. `an argument of the processor`.
    """
    nearest = difflib.get_close_matches(name, list(known), n=1)
    suggestion = f"; did you mean `{nearest[0]}`?" if nearest else ""
    return f"`{name}`: expected {what}, got an unknown name{suggestion}"
