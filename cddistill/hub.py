"""Upload of an exported student to the Hugging Face hub."""

from pathlib import Path


def check(name: str) -> None:
    """ValueError if a repository "user/name" cannot be written from here: a name that is none, or no token."""
    import huggingface_hub
    from huggingface_hub import errors, utils

    try:
        utils.validate_repo_id(name)
        wrong = "/" not in name
    except errors.HFValidationError:
        wrong = True
    if wrong:
        raise ValueError(f"--push_to_hub={name} is no name of a repository: write user/name")
    if not huggingface_hub.get_token():
        raise ValueError(f"--push_to_hub={name} needs a token: set HF_TOKEN, or run `hf auth login`")


def push(folder: Path, name: str, message: str, space: bool = False) -> str:
    """Add the files of a folder to the model repository `name` or, with `space`, to the Space of that name, made if
    there is none; returns its address.

    Raises ValueError, in one sentence, if the hub refuses or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    hub, kind = huggingface_hub.HfApi(), "space" if space else "model"
    try:
        made = hub.create_repo(name, exist_ok=True, repo_type=kind, space_sdk="gradio" if space else None)
        hub.upload_folder(repo_id=name, repo_type=kind, folder_path=folder, commit_message=message)
    except (errors.HTTPError, OSError, ValueError) as error:  # the client's; ValueError: of the card's metadata
        said = " ".join(str(error).split())
        raise ValueError(
            f"--push_to_hub={name} failed ({said:.200}): check the name and the token's rights; {folder} is complete"
        ) from error
    return str(made)
