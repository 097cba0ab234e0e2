"""A pool on the Hugging Face hub, up and down. Only what the manifest names travels, and only JSON, text and safetensors."""

import re
from collections.abc import Sequence
from pathlib import Path

from alula.errors import UserError
from alula.models.processors import first_line
from alula.pool.manifest import MANIFEST

CARD = "README.md"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = (
    MANIFEST,
    CARD,
    "base/*.safetensors",
    *(f"{kind}/*.{end}" for kind in ("experts", "learners") for end in ("json", "jsonl", "safetensors")),
)


def is_hub_name(name: str) -> bool:
    """Whether this may be ``owner/name`` and is no folder here."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def download(name: str) -> Path:
    """The folder with the hub's repository `name`, from the cache where it is there and the network is not.

    Raises:
        UserError: it is not on the hub, or cannot be reached.
    """
    from httpx import HTTPError
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"No pool in {name} ({MANIFEST} is missing), and the hub gave none of that name: {first_line(error)} "
            "Check the path of a folder; for a name on the hub check the name, the network and `hf auth login`."
        ) from error


def upload(folder: Path, files: Sequence[str], repo: str, *, private: bool) -> str:
    """Puts these files of a pool into the hub's repository `repo`, made if there is none, and gives its address.

    Raises:
        UserError: no card in the folder, no such owner, not logged in, or no network.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi

    if not (folder / CARD).exists():
        raise UserError(f"{folder} has no {CARD}, the page that people see on the hub. Write it: alula card {folder}")
    try:
        hub = HfApi(library_name="alula")
        hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(files), commit_message="Pool of experts by alula")
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"{folder} could not be put on the hub as '{repo}': {first_line(error)} Log in with `hf auth login`, "
            "and name a repository that you may write: owner/name."
        ) from error
    return f"https://huggingface.co/{repo}"
