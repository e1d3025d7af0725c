"""Push an exported folder to the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from httpx2 import HTTPError  # what huggingface_hub talks through
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from gemma_opt.errors import HubError, UsageError


def refuse_name(repo: str) -> None:
    """Raises UsageError for what cannot be a repository's name on the hub, or without a token."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo} cannot be a repository on the hub: {error}") from None
    if "/" not in repo:
        raise UsageError(f"{repo} lacks its owner: write it as <you>/{repo}")
    if not os.environ.get("HF_TOKEN"):
        raise UsageError("pushing needs a token that may write: set HF_TOKEN")


def push(folder: Path, repo: str, *, public: bool = False) -> str:
    """Upload a folder as one commit; the repository is made where there is none, private unless `public`.

    Token: HF_TOKEN. Returns the commit's address. Raises HubError (E3006), which says how to try again.
    """
    api = HfApi(token=os.environ.get("HF_TOKEN"))
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by gemma-opt").commit_url
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = "HF_TOKEN may not write there" if status in (401, 403) else f"the hub answered {status}"
    except (HTTPError, OSError) as error:
        why = f"the hub cannot be reached ({error})"
    raise HubError(f"{repo}: {why}. The folder is whole; try again with: hf upload {repo} {folder}")
