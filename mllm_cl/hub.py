"""Uploading an export: what would fail is refused before the work, not after it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_cl.recipe import RecipeError
from mllm_cl.stopping import Failed


class NotUploaded(Failed):
    """The hub did not take a folder, which is there all the same."""

    everywhere = True


@dataclass(frozen=True)
class Hub:
    """Where a folder is uploaded to, in the names of the Trainer's arguments; the token is that of
    `hf auth login` or of HF_TOKEN.
    """

    hub_model_id: str | None = None
    hub_private_repo: bool | None = None

    def checked(self, training: Mapping[str, Any]) -> "Hub":
        """The same, with what a recipe's `training` says where nothing was said here.

        Raises RecipeError without a name, offline, and without a token. Nothing is sent.
        """
        from huggingface_hub import get_token
        from huggingface_hub.constants import is_offline_mode

        said = {key: value for key, value in vars(self).items() if value is not None}
        known = {key: training[key] for key in vars(self) if key in training}
        found = replace(self, **(known | said))
        if not found.hub_model_id:
            problem = "there is no name to upload to: say --hub-model-id OWNER/NAME"
            raise RecipeError("--push-to-hub", problem)
        if is_offline_mode():
            problem = "HF_HUB_OFFLINE forbids it: unset that, or upload the folder later"
            raise RecipeError("--push-to-hub", problem)
        if get_token() is None:
            problem = "there is no token: run 'hf auth login', or set HF_TOKEN"
            raise RecipeError("--push-to-hub", problem)
        return found

    def push(self, folder: Path, message: str) -> None:
        """Upload a folder, into a repository that is made where there is none."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi()
        try:
            api.create_repo(self.hub_model_id, private=self.hub_private_repo, exist_ok=True)
            found = api.upload_folder(
                folder_path=folder, repo_id=self.hub_model_id, commit_message=message
            )
        except (HfHubHTTPError, OSError) as error:
            told = str(error).strip().splitlines()[-1]
            problem = f"{folder} is written, but the hub did not take it: {told}"
            raise NotUploaded(problem) from error
        print(f"uploaded: {found}", flush=True)
