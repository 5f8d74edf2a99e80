"""Find a model's folder: one on this machine, or a snapshot of one on the Hugging Face hub.

Only what is needed comes down: the safetensors, JSON and jinja files of the top folder. What is cached works offline.
HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HOME mean what they mean to huggingface_hub. What was found is pinned: the commit of
a hub model, or a hash of a folder's weights.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub

from nanoexit.config import ROOT
from nanoexit.errors import UserError

WANTED = ["*.safetensors", "*.json", "*.jinja"]
UNWANTED = ["*/*"]  # copies of the weights in other formats lie in folders of their own
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


class Found(NamedTuple):
    path: Path
    revision: str  # 40 hex digits of a commit, or "sha256:" and a hash of a folder


def find_model(name: str, revision: str | None = None) -> Found:
    """A folder (from the working directory, else from the root of the repository), or the id of a model on the hub.

    Raises UserError, in one line that says what to do, for whatever can go wrong on the way.
    """
    for path in (Path(name).expanduser(), ROOT / name):
        if path.is_dir():
            return Found(path, folder_revision(path))
    if not HUB_ID.fullmatch(name):
        raise UserError(f"model {name}: no such folder, and not the id of a model on the hub (OWNER/NAME)")
    path = Path(_fetch(f"model {name}", lambda: snapshot_download(
        name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED)))
    return Found(path, path.name)


def find_dataset_file(name: str) -> Path:
    """`hub:OWNER/NAME/path/in/the/dataset.jsonl` -> the file on this machine."""
    parts = name.removeprefix("hub:").split("/", 2)
    if len(parts) < 3:
        raise UserError(f"{name}: expected hub:OWNER/NAME/FILE")
    owner, dataset, file = parts
    return Path(_fetch(f"{name}", lambda: hf_hub_download(f"{owner}/{dataset}", file, repo_type="dataset")))


def folder_revision(folder: Path) -> str:
    """A hash of config.json and of every safetensors file's first and last MiB and size: cheap, and new weights change it."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return f"sha256:{digest.hexdigest()}"


def _fetch(what: str, download: Callable[[], str]) -> str:
    """Run a download; every way it can fail becomes one line that says what to do."""
    at = constants.ENDPOINT
    try:
        return download()
    except hub.GatedRepoError:
        raise UserError(f"{what}: gated at {at}: accept its terms on its page there, then set HF_TOKEN to a token of yours") from None
    except hub.RepositoryNotFoundError:
        raise UserError(f"{what}: {at} has none of that name, or it is private: check the spelling, or set HF_TOKEN") from None
    except hub.RevisionNotFoundError:
        raise UserError(f"{what}: no such revision at {at}: check model.revision") from None
    except hub.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{what}: not in the cache, and HF_HUB_OFFLINE is set: unset it once to download") from None
        raise UserError(f"{what}: {at} cannot be reached and the cache has no copy: check the connection{_cause(error)}") from None
    except hub.EntryNotFoundError:
        raise UserError(f"{what}: {at} has no such file there") from None
    except hub.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        advice = "set HF_TOKEN to a token that may read it" if code in (401, 403) else "try again later"
        raise UserError(f"{what}: {at} answered {code}: {advice}") from None
    except Exception as error:  # the HTTP library's own errors: dropped connections, timeouts, names that do not resolve
        raise UserError(f"{what}: the download from {at} broke off ({type(error).__name__}): run the same command again, "
                        f"files that came down whole are kept") from None


def _cause(error: BaseException) -> str:
    cause = error.__cause__
    return f" ({type(cause).__name__})" if cause else ""
