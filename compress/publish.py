"""Upload checkpoints to the Hugging Face hub (no torch)."""

from __future__ import annotations

from pathlib import Path

from compress.errors import CompressError, first_line
from compress.manifest import check_files, read_manifest

_NOT_PUSHED = (".cache/*", "*.partial", "report/results.jsonl")
_MESSAGE = "Upload a checkpoint made with compress"


def push(folder: Path, name: str, private: bool = False, revision: str | None = None, token: str | None = None) -> str:
    """Upload a checkpoint to the hub, model card and all; return its address there.

    Its files are checked against the manifest before. What is there already is not sent again, so that an upload that was
    interrupted continues.

    Args:
        folder: the checkpoint.
        name: ``owner/name`` of the repository, which is made if it is not there.
        private: whether a new repository can be seen by its owner alone.
        revision: branch to upload to; the main one if None.
        token: for the hub; the one that is logged in with if None.

    Raises:
        CompressError: no checkpoint that compress wrote, damaged files, or the hub refuses.
    """
    from huggingface_hub import HfApi

    manifest = read_manifest(folder)
    if manifest is None:
        raise CompressError(f"{folder}: is no checkpoint that compress wrote (it has no compression.json).")
    if name.count("/") != 1 or not all(name.split("/")):
        raise CompressError(f"{name!r}: give the repository as OWNER/NAME.")
    check_files(folder, manifest)
    hub = HfApi(token=token)
    try:
        address = str(hub.create_repo(name, private=private, exist_ok=True))
        if revision is not None:
            hub.create_branch(name, branch=revision, exist_ok=True)
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            ignore_patterns=list(_NOT_PUSHED),
            commit_message=_MESSAGE,
        )
    except Exception as error:  # network, authorisation: the hub's own types change between releases
        raise CompressError(f"{name}: the hub did not take the checkpoint ({first_line(error)}).") from error
    return address
