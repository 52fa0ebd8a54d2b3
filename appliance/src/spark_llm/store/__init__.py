"""The model store: downloads that resume, verify and stay.

``Store`` reads what is there; ``Request`` and ``Store.fetch`` bring what is not, in a process of their own. Nothing
here imports huggingface_hub; that happens in ``spark_llm.store.hub``, which only ever runs as that process.
"""

from spark_llm.store.lock import BusyError
from spark_llm.store.plan import split_name
from spark_llm.store.progress import Event, Failure, Note, Progress, Result
from spark_llm.store.request import Request
from spark_llm.store.store import Store, StoredModel, Verification

__all__ = [
    "BusyError",
    "Event",
    "Failure",
    "Note",
    "Progress",
    "Request",
    "Result",
    "Store",
    "StoredModel",
    "Verification",
    "split_name",
]
