"""One code per cause: the same word in the API, metrics, journal, and ``STATUS=``."""

from enum import StrEnum


class Reason(StrEnum):
    """Why the appliance is where it is. A code is never reused for another cause."""

    OK = "ok"
    # configuration and profile
    BAD_CONFIG = "bad_config"
    BAD_PROFILE = "bad_profile"
    UNKNOWN_PROFILE = "unknown_profile"
    PORT_IN_USE = "port_in_use"
    INSECURE_BIND = "insecure_bind"
    SOCKET_PATH_TOO_LONG = "socket_path_too_long"
    UNWRITABLE_DIRECTORY = "unwritable_directory"
    # model
    MODEL_MISSING = "model_missing"
    MODEL_INCOMPLETE = "model_incomplete"
    MODEL_CORRUPT = "model_corrupt"
    MODEL_UNSAFE = "model_unsafe"
    MODEL_BUSY = "model_busy"
    GATED = "gated"
    NOT_FOUND = "not_found"
    NETWORK = "network"
    STALLED = "stalled"
    NO_DISK = "no_disk"
    # memory
    DOES_NOT_FIT = "does_not_fit"
    MEMORY = "memory"
    # machine
    NO_GPU = "no_gpu"
    DRIVER = "driver"
    PEERS = "peers"
    # engine
    ENGINE_MISSING = "engine_missing"
    WRONG_ENGINE = "wrong_engine"
    ENGINE_EXITED = "engine_exited"
    ENGINE_STALLED = "engine_stalled"
    ENGINE_UNREACHABLE = "engine_unreachable"
    RESTART_BUDGET = "restart_budget"
    CANARY = "canary"
    # requests
    NOT_READY = "not_ready"
    DRAINING = "draining"
    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"
    ABORTED = "aborted"
    UNAUTHORIZED = "unauthorized"
    UNKNOWN_PATH = "unknown_path"
    BAD_REQUEST = "bad_request"
    BODY_TOO_LARGE = "body_too_large"
    HEADER_TOO_LARGE = "header_too_large"
    TIMEOUT = "timeout"
    # commands
    STOPPED_BY_USER = "stopped_by_user"
    INTERNAL = "internal"
