"""Uploads a finished checkpoint to the Hub; the same call goes on with an interrupted upload.

    publish("/models/MiMo-V2.5-bf16", "me/MiMo-V2.5-bf16")

The upload is `HfApi.upload_folder` of huggingface_hub 2, which took the place of `upload_large_folder`: it commits in
batches, skips files that the repository has, and sends no chunk of a file twice. Here is what it does not check.
"""

import os
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import CONFIG_NAME

from modeling_mimo.checkpoint_mimo_v2 import read_json_object

from .journal import JOURNAL_NAME
from .model_card import complete_card, model_card
from .verify import VerifyReport, verify


CARD_NAME = "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# formats that run code when they are opened
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
WEIGHTS = (".safetensors", ".safetensors.index.json", *PICKLES)

# hidden files (.env, .cache, .git) and what Python leaves; the Hub makes .gitattributes itself
IGNORED = (".*", "*/.*", "*__pycache__*")


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload the checkpoint in `folder` to the model repository `repo_id` and return its address.

    README.md is written if there is none, and gets the repository's name and what was verified.

    Args:
        repo_id: `owner/name`; made if it does not exist.
        private: whether a repository that is made is private.
        revision: branch to upload to, made if it does not exist; None for the main one.
        token: access token; None for the one that `hf auth login` keeps.

    Raises:
        ValueError: a folder that is not a complete and sound checkpoint or holds pickles; a wrong `repo_id`; no
            token; a repository with weights of another checkpoint, which would stay beside these.
        OSError: the Hub refused, or the connection broke.
    """
    folder = Path(folder)
    token = check_account(repo_id, token)
    report = check_publishable(folder)
    api = HfApi(token=token)
    url = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type="model", exist_ok=True)
    _check_no_other_weights(api, folder, repo_id, revision)
    _write_card(folder, repo_id, report)
    api.upload_folder(
        repo_id=repo_id,
        repo_type="model",
        folder_path=folder,
        revision=revision,
        commit_message="Upload checkpoint",
        ignore_patterns=list(IGNORED),
    )
    return str(url) if revision is None else f"{url}/tree/{revision}"


def check_account(repo_id: str, token: str | None = None) -> str:
    """The token to upload to `repo_id` with. ValueError: a wrong name; no token."""
    _check_repo_id(repo_id)
    token = token or get_token()
    if token is None:
        raise ValueError("token: expected an access token of the Hub, got none; run `hf auth login`.")
    return token


def check_publishable(folder: Path) -> VerifyReport:
    """What `verify` found in the headers. ValueError: anything that should not be on the Hub."""
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder}: expected a checkpoint with {CONFIG_NAME}, got none.")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    unfinished = [name for name in names if name.endswith(".partial") or name == JOURNAL_NAME]
    if unfinished or folder.name.endswith(".partial"):
        raise ValueError(
            f"{folder}: expected a finished conversion, got {', '.join(unfinished) or 'an interrupted one'}; "
            "`mimo convert --resume` goes on with it."
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise ValueError(f"{folder}: expected safetensors alone, got files that can run code: {', '.join(pickles)}.")
    missing = [name for name in TOKENIZER_FILES if name not in names]
    if missing:
        raise ValueError(f"{folder}: expected {' and '.join(TOKENIZER_FILES)}, got no {' and no '.join(missing)}.")
    report = verify(folder, headers_only=True)
    if report.problems:
        raise ValueError(f"{folder}: expected a complete checkpoint, got: {'; '.join(report.problems)}")
    return report


def _check_repo_id(repo_id: str) -> None:
    expected = "repo_id: expected owner/name out of letters, digits, '-', '_' and '.'"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{expected}, got {repo_id!r}: {' '.join(str(error).split())}") from None
    if "/" not in repo_id:
        raise ValueError(f"{expected}, got {repo_id!r}.")


def _check_no_other_weights(api: HfApi, folder: Path, repo_id: str, revision: str | None) -> None:
    """Files of an earlier upload would stay: a `model.safetensors` is even read before the index."""
    there = api.list_repo_files(repo_id, repo_type="model", revision=revision)
    others = sorted(name for name in there if name.endswith(WEIGHTS) and not (folder / name).is_file())
    if others:
        listed = ", ".join(others[:20]) + (f" and {len(others) - 20} more" if len(others) > 20 else "")
        raise ValueError(f"{repo_id}: expected no weights but those of {folder}, got {listed}; delete them first.")


def _write_card(folder: Path, repo_id: str, report: VerifyReport) -> None:
    path = folder / CARD_NAME
    card = path.read_text(encoding="utf-8") if path.is_file() else model_card(read_json_object(folder / CONFIG_NAME))
    completed = complete_card(card, repo_id, report.to_dict())
    if completed == card and path.is_file():
        return
    partial = path.with_name(f".{CARD_NAME}.partial")
    partial.write_text(completed, encoding="utf-8")
    partial.replace(path)


__all__ = ["check_publishable", "publish"]
