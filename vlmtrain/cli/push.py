"""``vlmtrain push``: upload a model folder or an export to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="a model folder, or the output of vlmtrain export")
    parser.add_argument("repo", metavar="REPO_ID", help="name of the Hub repository: OWNER/NAME")
    parser.add_argument("--public", action="store_true", help="create a public repository (default: private)")


def run(options: argparse.Namespace) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from ..errors import first_line
    from ..model.folder import is_model_folder, read_manifest

    if is_model_folder(options.folder) or not (options.folder / "config.json").is_file():
        read_manifest(options.folder)  # raises an error for any other folder
    api = huggingface_hub.HfApi()
    try:
        url = str(api.create_repo(options.repo, private=not options.public, exist_ok=True))
        api.upload_folder(repo_id=options.repo, folder_path=options.folder, commit_message="Upload model")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"cannot upload to {options.repo}: {first_line(error)}") from None
    print(json.dumps({"repo": options.repo, "url": url}) if options.json else url)
