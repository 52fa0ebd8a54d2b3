"""Who may ask, and who may change what is served. Pure.

With API keys the keys decide. Without, the service trusts this machine, and the question is who speaks for it: a web
page in its owner's browser reaches loopback too, under a name of its own (DNS rebinding) or with an Origin that is not
from here, and a proxy brings others' requests.
"""

import ipaddress
from collections.abc import Mapping
from typing import Any

from spark_llm import keys
from spark_llm.reason import Reason
from spark_llm.reply import Reply
from spark_llm.upstream import Headers

_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa")
"""Names that nobody can register (RFC 6761, 6762, 8375, and .internal as ICANN reserved it)."""
_FORWARDED = frozenset((b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip"))


def check(accepted: tuple[keys.Key, ...], scope: Mapping[str, Any], *, change: bool) -> str:
    """Let a request in, or not.

    Args:
        accepted: API keys; none means that there are no keys.
        scope: of ASGI; ``client`` must be the peer itself, not what a header says.
        change: the request changes what is served.

    Returns:
        The id of its key; empty without keys.

    Raises:
        Reply: 401 or 403.
    """
    headers: Headers = scope["headers"]
    if accepted:
        key = _key(headers, accepted)
        if change and key.scope != keys.ADMIN:
            raise Reply(
                403, Reason.UNAUTHORIZED, "this needs a key made with `spark-llm keys add --admin`"
            )
        return key.id
    sent = {name: value.decode("latin-1") for name, value in headers}
    host, origin = sent.get(b"host", ""), sent.get(b"origin", "")
    here = _is_loopback((scope.get("client") or ("",))[0])
    if (here and not _cannot_be_a_page_s(_name(host))) or not _is_from_here(origin):
        raise Reply(
            403,
            Reason.UNAUTHORIZED,
            "without API keys, web pages of other hosts are refused: ask for localhost, or make a key "
            "with `spark-llm keys add`",
        )
    if change and not (
        here
        and _is_loopback(_name(host))
        and origin.partition("://")[2] in {"", host}
        and _FORWARDED.isdisjoint(sent)
    ):
        raise Reply(
            403,
            Reason.UNAUTHORIZED,
            "without API keys, only programs on this machine may change things",
        )
    return ""


def _key(headers: Headers, accepted: tuple[keys.Key, ...]) -> keys.Key:
    """The first known key among those sent: libraries send one header or the other, and some send both."""
    sent = []
    for name, value in headers:
        token = value.decode("latin-1")
        if name == b"authorization" and token[:7].lower() == "bearer ":
            sent.append(token[7:].strip())
        elif name == b"x-api-key":
            sent.append(token)
    for token in sent:
        if (key := keys.match(token, accepted)) is not None:
            return key
    raise Reply(
        401,
        Reason.UNAUTHORIZED,
        "this API key is not known"
        if sent
        else "an API key is needed: `Authorization: Bearer ...` or `x-api-key: ...`",
    )


def _name(host: str) -> str:
    """``Host`` without its port, in lower case."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _cannot_be_a_page_s(name: str) -> bool:
    """Whether no page from elsewhere can have been loaded under ``name``: an address, or a name that nobody owns."""
    if "." not in name or name.endswith(_LOCAL_SUFFIXES):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_from_here(origin: str) -> bool:
    """Whether a page of ``origin`` may ask: none, one of this machine's, or an application that is no web page."""
    scheme, _, host = origin.lower().partition("://")
    if not origin or (scheme not in {"http", "https", "null"} and host):
        return True
    return _is_loopback(_name(host)) or _name(host).endswith(".localhost")
