"""Whether what a config names is on the Hugging Face hub: asked once, for a mistyped path is no reason for retries and waits."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

ANSWER_S = 10.0
"""How long the hub may take to answer."""


def hub_problem(path: str, *, kind: Literal["model", "dataset"], revision: str | None) -> str:
    """Return why a hub id that is not in the cache cannot be read; "" where nothing speaks against it."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.file_download import repo_folder_name

    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type=kind)).is_dir():
        return ""
    try:
        url = hf_hub_url(path, "config.json", repo_type=kind, revision=revision)
        get_hf_file_metadata(url, timeout=ANSWER_S)
    except RevisionNotFoundError:
        problem = f"the {kind} {path} on the Hugging Face hub has no revision {revision!r}"
    except EntryNotFoundError:  # it is there; what it lacks, its reader says
        return ""
    except RepositoryNotFoundError:
        problem = f"the Hugging Face hub has no {kind} {path} (of a private one, set HF_TOKEN)"
    except HfHubHTTPError:  # gated, or busy: its reader knows more
        return ""
    except Exception as error:  # no network, no answer in time, or HF_HUB_OFFLINE
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        problem = f"the Hugging Face hub could not be asked for a {kind} of this name ({reason})"
    return f"there is no {path} here, and {problem}{near_path(path)}"


def near_path(path: str) -> str:
    """Return ". Did you mean '...'?" with the most similar file or folder beside where the path leads; "" where none is."""
    wanted, folder = Path(path).expanduser(), Path(path).expanduser()
    while not folder.is_dir():
        folder = folder.parent
    rest = wanted.relative_to(folder).parts if wanted != folder else ()
    if not rest or folder == folder.parent != Path():
        return ""  # the root has nothing to do with it
    entries = {entry.name: entry for entry in folder.iterdir()}
    near = difflib.get_close_matches(rest[0], entries, n=1, cutoff=0.6)
    return f". Did you mean {str(entries[near[0]].joinpath(*rest[1:]))!r}?" if near else ""
