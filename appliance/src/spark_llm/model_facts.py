"""What the ledger needs of a model: from its folder, or from the hub without its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spark_llm.architecture import Architecture, read_architecture
from spark_llm.errors import SparkLlmError, TryAgainError
from spark_llm.ledger import Model
from spark_llm.profile import Profile
from spark_llm.reason import Reason
from spark_llm.weights import Tensor, Weights, read_folder, sum_up


def read_model(folder: Path, draft: Path | None = None) -> Model:
    """Facts of the model in ``folder``, headers only.

    Raises:
        SparkLlmError: a file is missing or damaged; names it.
        ConfigError: a kind of layer that cannot be counted.
    """
    if draft is None:
        return Model(_architecture(folder), read_folder(folder))
    return Model(
        _architecture(folder), read_folder(folder), _architecture(draft), read_folder(draft)
    )


def _architecture(folder: Path) -> Architecture:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SparkLlmError(
            f"{path} cannot be read: {error}",
            reason=Reason.MODEL_INCOMPLETE,
            hint="`spark-llm verify` checks the model's files.",
        ) from error
    return read_architecture(config)


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
    return Model(read_architecture(config), weights, read_architecture(draft_config), draft_weights)


def _fetch(
    repository: str, revision: str, endpoint: str | None, token: str | None
) -> tuple[Mapping[str, Any], Weights]:
    # Imported here: half a second that only this path should pay.
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    api = HfApi(endpoint=endpoint, token=token or False)
    commit = revision or None
    try:
        path = api.hf_hub_download(repository, "config.json", revision=commit)
        metadata = api.get_safetensors_metadata(repository, revision=commit)
    except (HfHubHTTPError, OSError, ValueError) as error:
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
    return json.loads(Path(path).read_bytes()), sum_up(tensors)
