"""API keys: made here, shown once, stored as salted hashes."""

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError

from spark_llm.errors import ConfigError, RefusedError
from spark_llm.owner import not_yours
from spark_llm.reason import Reason

PREFIX = "sk-spark-"
Scope = Literal["admin", "inference"]
ADMIN: Final = "admin"
INFERENCE: Final = "inference"


@dataclass(frozen=True)
class Key:
    """One key, without the key.

    Attributes:
        id: names it in lists and logs.
        name: who it is for.
        scope: ``inference``, or ``admin`` which may also change what is served.
        salt: 16 bytes, hex.
        hash: BLAKE2b-256 of the key under the salt, hex. The key has 256 random bits, so a slow hash would add nothing.
        created: Unix time in seconds.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)

    id: str
    name: str
    scope: Scope
    salt: Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
    hash: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    created: int

    def public(self) -> dict[str, str | int]:
        """What may be shown of it."""
        return {"id": self.id, "name": self.name, "scope": self.scope, "created": self.created}


_FILE = TypeAdapter(tuple[Key, ...])


def digest(token: str, salt: str) -> str:
    """The stored form of ``token``."""
    return hashlib.blake2b(token.encode(), salt=bytes.fromhex(salt), digest_size=32).hexdigest()


def match(token: str, keys: tuple[Key, ...]) -> Key | None:
    """The key that ``token`` is. Always looks at all of them, each in constant time."""
    found = None
    for key in keys:
        if hmac.compare_digest(digest(token, key.salt), key.hash):
            found = key
    return found


def load(path: Path) -> tuple[Key, ...]:
    """All keys of the file; none if there is no file.

    Raises:
        ConfigError: the file is damaged, or a field is none: better now than with every request. It is never read as
            "no keys", which would open the door, and an unknown scope is never read as a lesser one.
    """
    try:
        return _FILE.validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()
    except PermissionError:
        raise not_yours(path) from None
    except ValidationError as error:
        # Where and why, not what: hashes have no business in a log.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        why = f"{where}: {first['msg']}" if where else first["msg"]
        raise _damaged(path, why) from None
    except OSError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read as API keys: {why}",
        hint="Restore it, or remove it and make new keys with `spark-llm keys add`.",
    )


def add(path: Path, name: str, scope: Scope) -> tuple[Key, str]:
    """Make a key; returns it and the token, which is kept nowhere."""
    keys = load(path)
    if any(key.name == name for key in keys):
        raise RefusedError(
            f"there is a key named {name!r} already",
            reason=Reason.BAD_CONFIG,
            hint="Remove it first with `spark-llm keys remove`.",
        )
    token = PREFIX + secrets.token_urlsafe(32)
    salt = secrets.token_hex(16)
    key = Key(secrets.token_hex(4), name, scope, salt, digest(token, salt), int(time.time()))
    _save(path, (*keys, key))
    return key, token


def remove(path: Path, name_or_id: str) -> Key:
    """Remove one key.

    Raises:
        RefusedError: there is none of that name or id.
    """
    keys = load(path)
    for key in keys:
        if name_or_id in (key.id, key.name):
            _save(path, tuple(other for other in keys if other is not key))
            return key
    raise RefusedError(f"no key is named {name_or_id!r}", reason=Reason.NOT_FOUND)


def _save(path: Path, keys: tuple[Key, ...]) -> None:
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".keys.")
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump([asdict(key) for key in keys], stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).rename(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
