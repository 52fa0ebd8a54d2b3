"""What the ledger needs of a model: from its folder, or from the hub without its weights."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spark_llm.architecture import Architecture, read_architecture
from spark_llm.demo_model import write_demo_model
from spark_llm.errors import ConfigError, SparkLlmError, TryAgainError
from spark_llm.ledger import Model
from spark_llm.profile import DEMO_MODEL, Profile
from spark_llm.reason import Reason
from spark_llm.store.store import Store
from spark_llm.weights import Tensor, Weights, read_folder, sum_up

_TIMEOUT_S = 10.0


def local_model(profile: Profile, models: Path) -> Model | None:
    """Facts of the profile's model as it lies in the store or in a folder of its own; None if it is not there.

    Raises:
        SparkLlmError: a file of it is damaged.
    """
    folder = _folder(profile.model, profile.revision, models)
    if folder is None and profile.model == DEMO_MODEL:
        with tempfile.TemporaryDirectory() as made:
            write_demo_model(Path(made) / DEMO_MODEL)
            return read_model(Path(made) / DEMO_MODEL)
    if folder is None:
        return None
    speculative = profile.speculative
    if speculative is None or not speculative.model:
        return known_model(profile, folder)
    draft = _folder(speculative.model, speculative.revision, models)
    return None if draft is None else known_model(profile, folder, draft)


def _folder(model: str, revision: str, models: Path) -> Path | None:
    if model == DEMO_MODEL or Path(model).is_absolute():
        folder = models / model  # an absolute path stays what it is
        return folder if (folder / "config.json").is_file() else None
    return Store(models).locate(model, revision)


def read_model(folder: Path, draft: Path | None = None) -> Model:
    """Facts of the model in ``folder``, headers only.

    Raises:
        SparkLlmError: a file is missing or damaged; names it.
        ConfigError: a kind of layer that cannot be counted.
    """
    if draft is None:
        return Model(_architecture(folder), read_folder(folder))
    return Model(
        _architecture(folder),
        read_folder(folder),
        _architecture(draft, draft=True),
        read_folder(draft),
    )


def known_model(profile: Profile, folder: Path, draft: Path | None = None) -> Model | None:
    """:func:`read_model`, or None for a model whose layers cannot be counted but whose profile gives its size.

    Raises:
        SparkLlmError: a file is missing or damaged.
        ConfigError: layers that cannot be counted, and no ``memory.weights_bytes`` to go by.
    """
    try:
        return read_model(folder, draft)
    except ConfigError:
        if profile.memory.weights_bytes:
            return None
        raise


def _architecture(folder: Path, *, draft: bool = False) -> Architecture:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SparkLlmError(
            f"{path} cannot be read: {error}",
            reason=Reason.MODEL_INCOMPLETE,
            hint="`spark-llm verify` checks the model's files.",
        ) from error
    return read_architecture(config, draft=draft)


def fetch_model(
    profile: Profile, *, endpoint: str | None = None, token: str | None = None
) -> Model:
    """Facts of the profile's model and draft from the hub, by HTTP range: some 100 kB, no weights.

    Args:
        profile: names the repositories and commits.
        endpoint: the hub's address; None takes ``HF_ENDPOINT`` or the public one.
        token: for gated models.

    Raises:
        TryAgainError: the hub cannot be reached or does not give the files.
        ConfigError: a kind of layer that cannot be counted.
    """
    config, weights = _fetch(profile.model, profile.revision, endpoint, token)
    speculative = profile.speculative
    if speculative is None or not speculative.model:
        return Model(read_architecture(config), weights)
    draft_config, draft_weights = _fetch(speculative.model, speculative.revision, endpoint, token)
    draft = read_architecture(draft_config, draft=True)
    return Model(read_architecture(config), weights, draft, draft_weights)


def _fetch(
    repository: str, revision: str, endpoint: str | None, token: str | None
) -> tuple[Mapping[str, Any], Weights]:
    # Imported here: half a second that only this path should pay.
    from httpx2 import HTTPError  # noqa: PLC0415
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    api = HfApi(endpoint=endpoint, token=token or False)
    try:
        # Asked first because it fails at once without a network; the others try for half a minute.
        commit = api.model_info(repository, revision=revision or None, timeout=_TIMEOUT_S).sha
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(repository, "config.json", revision=commit, local_dir=folder)
            config = json.loads(Path(path).read_bytes())
        metadata = api.get_safetensors_metadata(repository, revision=commit)
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise TryAgainError(
            f"the hub does not give the headers of {repository}: {str(error).splitlines()[0]}",
            reason=Reason.NETWORK,
            hint="Check the network, or `spark-llm pull` first; gated models need a token.",
        ) from error
    tensors = (
        Tensor(name, tensor.dtype, tensor.data_offsets[1] - tensor.data_offsets[0])
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    )
    return config, sum_up(tensors)
