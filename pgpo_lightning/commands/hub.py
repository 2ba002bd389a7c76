"""Upload of an exported model to the Hugging Face Hub, only where it is asked for."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id


def check_access(repository: str) -> None:
    """Check, before anything is written, that there is an account to upload with.

    Args:
        repository: ``owner/name``.

    Raises:
        ValueError: If the name is none of a repository, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"Expected `push` to be owner/name, but {error}") from None
    if repository.count("/") != 1:
        raise ValueError(f"Expected `push` to be owner/name, but got {repository}.")
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        raise ValueError(
            f"Expected an account of the Hugging Face Hub to push {repository} with, but {_first_line(error)}. Log in by "
            "`hf auth login`, or set HF_TOKEN."
        ) from None


def upload(folder: str, repository: str, private: bool | None) -> str:
    """Upload a folder, and return the address of the repository.

    Args:
        folder: Of the exported model.
        repository: ``owner/name``; created if it does not exist.
        private: Whether it is then private; null for what the account says.

    Raises:
        ValueError: If the Hub refuses.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        message = f"Upload {Path(folder).name} from pgpo-lightning"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except (OSError, HTTPError) as error:
        raise ValueError(f"Expected the Hub to take {repository}, but {_first_line(error)}.") from None
    return str(url)


def _first_line(error: Exception) -> str:
    return next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip()).rstrip(".")
