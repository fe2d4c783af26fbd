"""A result on its way to a model hub, through the hub's own client."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.errors import ConfigError, TransportError, one_line


def check_push(repo: str) -> None:
    """Refuse before anything is written what could not be pushed afterwards.

    Raises:
        ConfigError: *repo* is no id of a repository, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub: {one_line(error)}") from None
    if is_offline_mode():
        raise ConfigError("--push-to-hub: HF_HUB_OFFLINE is set; unset it, or leave the option out")
    if get_token() is None:
        raise ConfigError(
            "--push-to-hub: there is no token for the hub; log in with `hf auth login`, or set "
            "HF_TOKEN to one that may write"
        )


def push(folder: Path, repo: str, *, public: bool) -> str:
    """Push all files of *folder* to *repo*, which is made where there is none; return its address.

    Raises:
        TransportError: the hub cannot be reached, or does not want it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Trained with EdgeSplit"
        )
    except Exception as error:  # noqa: BLE001 - the hub client raises a wide family of errors
        # The client wraps some errors in one that says less.
        told = dict.fromkeys(one_line(e) for e in (error, error.__cause__) if e is not None)
        raise TransportError(
            f"{folder} is written, but not pushed to {repo!r}: {'; '.join(told)}"
        ) from error
    return str(url)
