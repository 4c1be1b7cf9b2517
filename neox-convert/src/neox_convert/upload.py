# SPDX-License-Identifier: Apache-2.0
"""Put an exported directory on the Hugging Face hub. The token comes from where huggingface_hub keeps it."""

from __future__ import annotations

from pathlib import Path

from libneox.errors import InputMissing, StorageError, UsageError


def upload(directory: str, repository: str, *, branch: str | None, private: bool, message: str | None) -> str:
    """Upload every file of a Hugging Face model directory; returns the address of the commit.

    Raises:
        UsageError: not such a directory.
        InputMissing: huggingface_hub is not installed.
        StorageError: the hub refused or cannot be reached. The message never holds the token.
    """
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{directory}: no config.json in it; export with to-hf first")
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        raise InputMissing("huggingface_hub is not installed; pip install 'neox-convert[hub]'") from error
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch,
            commit_message=message or f"Upload {folder.resolve().name}",
            ignore_patterns=[".*", "*.tmp-*"],
        )
    except Exception as error:  # the hub's client raises its own, requests' and httpx's errors
        text = " ".join(str(error).split())
        token = get_token()
        if token:
            text = text.replace(token, "***")
        raise StorageError(f"{repository}: {text[:300]}; see `hf auth login`") from None
    return str(getattr(commit, "commit_url", commit))
