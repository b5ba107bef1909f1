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
"""Arguments of `from_pretrained` of a processor and its parts: which there are, and what is refused."""

from collections.abc import Iterable

from modeling_mimo.unknown_names_mimo_v2 import unknown_name


# where files are and how they are read, for all classes of Transformers
LOADING_ARGUMENTS = {
    "backend",
    "cache_dir",
    "code_revision",
    "config",
    "force_download",
    "local_files_only",
    "mirror",
    "proxies",
    "resume_download",
    "return_unused_kwargs",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_auth_token",
    "use_fast",
}
# what a processor hands on to its tokenizer
TOKENIZER_ARGUMENTS = {
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "additional_special_tokens",
    "bos_token",
    "chat_control_tokens",
    "chat_template",
    "clean_up_tokenization_spaces",
    "cls_token",
    "eos_token",
    "errors",
    "extra_special_tokens",
    "fix_mistral_regex",
    "mask_token",
    "max_len",
    "model_input_names",
    "model_max_length",
    "model_specific_special_tokens",
    "name_or_path",
    "pad_token",
    "padding_side",
    "response_schema",
    "response_template",
    "sep_token",
    "split_special_tokens",
    "tokenizer_file",
    "tokenizer_object",
    "tokenizer_type",
    "truncation_side",
    "unk_token",
    "verbose",
}


def check_loading_arguments(kwargs: dict, settings: Iterable[str]) -> None:
    """ValueError: an argument of `from_pretrained` that is none of LOADING_ARGUMENTS and `settings`.

    A pipeline hands on what is meant for its model, and whoever asks for unused arguments gets them back.
    """
    if kwargs.get("_from_pipeline") is not None or kwargs.get("return_unused_kwargs"):
        return
    known = {*LOADING_ARGUMENTS, *settings}
    for name in kwargs:
        # `_from_auto`, `_commit_hash`: Transformers' own
        if name not in known and not name.startswith("_"):
            raise ValueError(unknown_name(name, known, "an argument of `from_pretrained`"))
