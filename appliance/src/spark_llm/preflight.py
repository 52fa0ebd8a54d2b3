"""What can be known of a start before anything is stopped for it: the machine, the engine, the model, its memory."""

from dataclasses import replace
from pathlib import Path

from spark_llm import gate, host, ledger, manifest, model_facts
from spark_llm.config import Settings
from spark_llm.engine import engine_python, need_interpreter
from spark_llm.errors import RefusedError
from spark_llm.folders import Folders
from spark_llm.high_water import HighWater, build_of
from spark_llm.model_folder import check_model_folder
from spark_llm.profile import DEMO_MODEL, DEMOS, Engine, Profile
from spark_llm.reason import Reason
from spark_llm.store import Store
from spark_llm.store.transfer import refuse_offline


def refuse_hopeless(profile: Profile, settings: Settings, folders: Folders) -> None:
    """Refuse what could not be served here even if nothing else were; reads files, and never asks the hub.

    Raises:
        SparkLlmError: as the start itself would end.
    """
    python = engine_python(settings)
    refuse_wrong_machine(profile, python)
    need_interpreter(python)
    store = Store(folders.models)
    absent = False
    for model, revision in named_models(profile):
        if on_hub(model):
            if store.locate(model, revision) is None:
                refuse_offline(model, revision)
                absent = True
        elif model != DEMO_MODEL:
            check_model_folder(Path(model))
    if absent:
        return  # what it takes, its files will tell
    facts = model_facts.local_model(profile, folders.models)
    measured, _ = HighWater(folders.high_water).recall(profile, build_of(python))
    machine = host.machine(
        reserve_bytes=settings.memory.reserve_bytes, kernels=host.kernels_of(python)
    )
    idle = replace(machine, available=machine.total)
    account = ledger.account(profile, idle, facts, measured)
    verdict = gate.decide(
        gate.GateFacts(
            need_bytes=account.need_bytes,
            reserve_bytes=idle.reserve,
            available_bytes=idle.available,
            total_bytes=idle.total,
        )
    )
    if verdict.action is gate.Action.REFUSE:
        raise refusal(verdict, account)


def refuse_wrong_machine(profile: Profile, python: Path) -> None:
    """Refuse a profile for other nodes, another GPU or another build of vLLM than those that are here.

    Args:
        profile: what is to be served.
        python: the engine's interpreter.

    Raises:
        RefusedError: which of them.
    """
    if profile.nodes > 1:
        raise RefusedError(
            f"profile {profile.name} is for {profile.nodes} nodes and this is one",
            reason=Reason.PEERS,
            hint="Choose a profile for one node; `spark-llm profiles` lists them.",
        )
    if profile.engine is Engine.CUDA and not host.driver_version():
        raise RefusedError(
            f"profile {profile.name} needs an NVIDIA GPU and no driver is loaded",
            reason=Reason.NO_GPU,
            hint="`nvidia-smi` should list it, and `systemctl status spark-llm-driver` say that its libraries are "
            "linked. Without a GPU, `make serve` in a checkout runs the demo on the CPU.",
        )
    kind = manifest.engine_kind(python)
    if kind and kind is not profile.engine:
        raise RefusedError(
            f"profile {profile.name} is for the {profile.engine} build of vLLM, and {python} has the {kind} build",
            reason=Reason.WRONG_ENGINE,
            hint=f"`--profile {DEMOS[kind]}` is the demo for it; engine.python names another engine.",
        )


def refusal(verdict: gate.GateVerdict, account: ledger.Ledger) -> RefusedError:
    """The error that the gate's refusal is, with the ledger where memory is the cause."""
    message = verdict.message
    if verdict.reason in {Reason.DOES_NOT_FIT, Reason.MEMORY}:
        message += f"; needed for {account.itemised}"
    return RefusedError(message, reason=verdict.reason, hint=verdict.hint)


def named_models(profile: Profile) -> tuple[tuple[str, str], ...]:
    """The model that ``profile`` names and its draft, if that is one of its own, each with its revision."""
    named = ((profile.model, profile.revision),)
    draft = profile.speculative
    return (*named, (draft.model, draft.revision)) if draft and draft.model else named


def on_hub(model: str) -> bool:
    """Whether the store keeps it, rather than a folder of its own."""
    return model != DEMO_MODEL and not Path(model).is_absolute()
