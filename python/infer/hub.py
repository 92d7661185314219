"""From what a user names to a path on disk: a folder, a `.gguf` file, or a Hugging Face hub id with optional `:quant`.

A name that exists on disk always wins over a hub id. Only the files that this engine reads are downloaded: a repository's
pickles, ONNX exports and sibling quantizations stay where they are. The list of files is fetched before the first byte of
weights, so that a wrong `:quant` costs one small request, not gigabytes.
"""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from infer._core import InferError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BUNDLED", "DRAFTS", "Hub", "resolve"]

BUNDLED = Path(__file__).parent / "bundled" / "tinylm.gguf"
DRAFTS = {BUNDLED: BUNDLED.with_name("tinylm-draft.gguf")}  # models that bring one that guesses for them

# Everything that is read beside the weights; absent ones are simply not there.
SMALL_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.json",
        "chat_template.jinja",
        "processor_config.json",
    }
)
SMALL_PATTERNS = ("*.tiktoken", "additional_chat_templates/*.jinja")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REACH_SECONDS = 10.0  # how long the hub may take to list a repository's files
# Which GGUF file is taken when the repository holds several and none is named: the most exact of the small ones first.
PREFERRED_QUANTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "BF16", "F16", "F32")

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z0-9][\w.-]*)(?::(?P<quant>[\w.-]+))?")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


def resolve(
    model: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Find `model` on disk, downloading it first if it is a hub id.

    Parameters
    ----------
    model
        A folder in Hugging Face layout, a `.gguf` file, `org/name`, `org/name:quant` or None for the bundled model.
    revision
        Branch, tag or commit of a hub id.
    token
        Access token for private or gated repositories; without it the one that `hf auth login` stored, if any.
    cache_dir
        Where downloads are kept; without it huggingface_hub's own cache.
    local_files_only
        Take a hub id from the cache and never touch the network, as `HF_HUB_OFFLINE=1` does.

    Returns
    -------
    Path
        An existing folder or file.

    Raises
    ------
    InferError
        If nothing is found under that name, or the network or the repository refuses.
    """
    _check("revision", revision, str, "a string or None")
    _check("token", token, str, "a string or None")
    _check("cache_dir", cache_dir, (str, os.PathLike), "a path or None")
    _check("local_files_only", local_files_only, bool, "True or False", is_optional=False)
    if model is None:
        if not BUNDLED.is_file():
            raise InferError(f"model: the bundled model is missing from this installation ({BUNDLED}); name a model")
        return _local(BUNDLED, revision)
    if not isinstance(model, (str, os.PathLike)):
        raise InferError(f"model: a path, a hub id or None is needed, got {type(model).__name__}")
    if not os.fspath(model):
        raise InferError("model: the name is empty; leave it away for the bundled model")
    path = expanded(model)
    try:
        exists = path.exists()
    except (OSError, ValueError):  # too long a name, or a NUL inside it
        exists = False
    if exists:
        return _local(path, revision)
    match = _HUB_ID.fullmatch(model) if isinstance(model, str) else None
    if match is None or path.suffix == ".gguf":
        raise InferError(
            f"model: {os.fspath(model)!r} does not exist here and is no hub id; "
            "name a folder, a .gguf file, or a hub id such as 'org/name' or 'org/name:Q8_0'"
        )
    hub = Hub(match["repo"], revision, token, cache_dir, local_files_only)
    return hub.fetch(match["quant"])


def _check(name: str, value: Any, kinds: Any, right: str, *, is_optional: bool = True) -> None:
    if not (isinstance(value, kinds) or (is_optional and value is None)):
        raise InferError(f"{name}: {right} is needed, got {value!r:.80}")


def _local(path: Path, revision: str | None) -> Path:
    """Return what lies on this machine, of which there are no revisions."""
    if revision is not None:
        raise InferError(f"revision: {revision!r} can be had of a hub id only, and {path} is on this machine")
    return path


def expanded(path: str | os.PathLike[str]) -> Path:
    """Put the home folder in the place of `~`; `~name` of a user that is not known stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


class Hub:
    """One repository on the Hugging Face hub, or its copy in the local cache."""

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        self.repo = repo
        self.revision = revision
        self.token = token
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.local_files_only = local_files_only

    def fetch(self, quant: str | None) -> Path:
        """Download what is needed of the repository and return the folder or the GGUF file.

        Parameters
        ----------
        quant
            Part of a GGUF file's name, as in `model-Q8_0.gguf`; None takes safetensors weights where there are any.
        """
        files = self.files()
        has_folder = "config.json" in files and (WEIGHTS in files or INDEX in files)
        if quant is None and has_folder:
            return self._snapshot(self._folder_files(files))
        parts = choose_gguf(self.repo, files, quant)
        return self._snapshot(parts) / parts[0]

    def files(self) -> set[str]:
        """Return the names of all files of the repository; without a network, those in the cache."""
        if not self._offline():
            from huggingface_hub import HfApi

            try:
                # `list_repo_files` tries for 23 s to reach a dead network; this call fails at once.
                found = HfApi(token=self.token).model_info(self.repo, revision=self.revision, timeout=REACH_SECONDS)
                return {sibling.rfilename for sibling in found.siblings or []}
            except self._errors() as error:
                if not self._is_unreachable(error):
                    self._explain(error)
                self.local_files_only = True  # the cache may do; if not, the error below says why it was asked
                unreachable: Exception | None = error
        else:
            unreachable = None
        try:
            folder = self._download([], local_files_only=True)  # no file is wanted yet, only where they are
        except self._errors() as error:
            self._explain(unreachable or error)
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}

    def _folder_files(self, files: set[str]) -> list[str]:
        small = sorted(name for name in files if _is_small(name))
        if WEIGHTS in files:
            return [*small, WEIGHTS]
        index = self._snapshot([INDEX]) / INDEX
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InferError(f"{self.repo}: {INDEX} has no readable 'weight_map' ({error})") from error
        if missing := sorted(str(name) for name in shards if name not in files):
            raise InferError(f"{self.repo}: {INDEX} names {missing[0]!r}, which the repository does not hold")
        return [*small, INDEX, *sorted(shards)]

    def _snapshot(self, names: Iterable[str]) -> Path:
        """Download `names`, resuming where an earlier try stopped, and return the folder that holds them."""
        names = list(names)
        try:
            folder = self._download(names, self.local_files_only)
        except self._errors() as error:
            self._explain(error)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise InferError(f"{self.repo}: {missing[0]!r} is not in the local cache and cannot be downloaded offline")
        return folder

    def _download(self, names: list[str], local_files_only: bool) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.repo,
                revision=self.revision,
                cache_dir=self.cache_dir,
                token=self.token,
                local_files_only=local_files_only,
                allow_patterns=[glob.escape(name) for name in names],
            )
        )

    def _offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or bool(constants.HF_HUB_OFFLINE)

    @staticmethod
    def _errors() -> tuple[type[Exception], ...]:
        """Return what huggingface_hub and its HTTP library raise; the library changed twice, its base class says which."""
        from huggingface_hub import errors

        later = (getattr(errors, name, OSError) for name in ("RevisionResolutionError", "XetDownloadError"))
        return (errors.HFValidationError, *errors.HfHubHTTPError.__bases__, OSError, *later)

    @staticmethod
    def _is_unreachable(error: Exception) -> bool:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if isinstance(error, HFValidationError):
            return False
        if isinstance(error, HfHubHTTPError):
            status = getattr(error.response, "status_code", 0)
            return bool(status >= 500 or status == 429)
        return True

    def _explain(self, error: Exception) -> NoReturn:
        """Turn what the hub library raised into one sentence a user can act upon."""
        from huggingface_hub import errors

        where = f"model: {self.repo!r}" + (f" at revision {self.revision!r}" if self.revision else "")
        if isinstance(error, errors.HFValidationError):
            text = f"{where} is no valid hub id: {error}"
        elif isinstance(error, errors.GatedRepoError):
            text = f"{where} is gated: accept its terms on the hub, then pass token= or run `hf auth login`"
        elif isinstance(error, errors.RevisionNotFoundError):
            text = f"{where}: the hub has no such revision"
        elif isinstance(error, errors.RepositoryNotFoundError):
            text = f"{where} is neither a path here nor a repository on the hub that this token may read"
        elif self._offline() and isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            text = f"{where} is not in the local cache, and offline mode forbids downloading it"
        elif self._is_unreachable(error):
            text = (
                f"{where} is not in the local cache and the hub cannot be reached ({type(error).__name__}: {error}); "
                "name a folder or a .gguf file, or try again with a network"
            )
        else:
            text = f"{where}: the hub refused ({error})"
        raise InferError(text) from error


def _is_small(name: str) -> bool:
    """Tell whether a file is read beside the weights; a pattern's folders must be those of the name."""
    path = PurePosixPath(name)
    patterns = (PurePosixPath(pattern) for pattern in SMALL_PATTERNS)
    return name in SMALL_FILES or any(path.parent == each.parent and path.match(each.name) for each in patterns)


def choose_gguf(repo: str, files: Iterable[str], quant: str | None) -> list[str]:
    """Pick one model of a repository's GGUF files.

    Parameters
    ----------
    repo
        Only named in errors.
    files
        Every file of the repository, with `/` between folders.
    quant
        Whole part of the name, without regard to case: `Q4_0` takes `x-q4_0.gguf`, not `x-IQ4_0.gguf` or `x-Q4_0_8.gguf`.

    Returns
    -------
    list of str
        One file, or all parts of a split model in order; the first stands for them all.

    Raises
    ------
    InferError
        If none or several models fit; the sentence lists what there is.
    """
    models = _gguf_models(files)
    if not models:
        if quant is None:
            raise InferError(f"model: {repo!r} holds neither {WEIGHTS} (with config.json) nor a .gguf file")
        raise InferError(f"model: {repo!r} holds no .gguf file, so ':{quant}' picks nothing; leave it away")
    for wanted in [quant] if quant is not None else [None, *PREFERRED_QUANTS]:
        fitting = [name for name in models if wanted is None or _names_quant(name, wanted)]
        if len(fitting) == 1:
            return _complete(repo, models[fitting[0]])
        if fitting and wanted is not None:
            raise InferError(f"model: {repo!r} holds several files for ':{wanted}': {_listing(fitting)}")
    advice = "add ':' and a quantization" if quant is None else f"none is named ':{quant}'"
    raise InferError(f"model: {repo!r} holds {len(models)} .gguf files, {advice}: {_listing(list(models))}")


def _gguf_models(files: Iterable[str]) -> dict[str, list[str]]:
    """Return name -> files of each model, a split one under its name without part numbers."""
    models: dict[str, list[str]] = {}
    for name in sorted(files):
        if name.lower().endswith(".gguf") and not _is_companion(name):
            models.setdefault(_PART.sub(".gguf", name), []).append(name)
    return models


def _is_companion(name: str) -> bool:
    """Tell whether a GGUF file is no language model: a vision projector or an importance matrix."""
    stem = PurePosixPath(name).name.lower()
    return stem.startswith("mmproj") or "imatrix" in stem


def _names_quant(name: str, quant: str) -> bool:
    base = PurePosixPath(name).name.lower()
    if base == quant.lower():
        return True
    stem = base.removesuffix(".gguf")
    return re.search(rf"(^|[-._]){re.escape(quant.lower())}($|[-.])", stem) is not None


def _complete(repo: str, parts: list[str]) -> list[str]:
    """Return the parts of a model if none is missing."""
    part = _PART.search(parts[0])
    if part is not None and len(parts) != int(part[2]):
        raise InferError(f"model: {repo!r} holds {len(parts)} of the {int(part[2])} parts of {PurePosixPath(parts[0]).name!r}")
    return parts


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown}, ... ({len(names)} in all)"
