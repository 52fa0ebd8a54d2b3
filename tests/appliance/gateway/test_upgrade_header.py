"""Upgrade lines are taken out of a request's head, however it is cut."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from spark_llm.gateway.upgrade_header import UpgradeFilter

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"X-Note: upgrade: no\r\nUpgrade-Insecure-Requests: 1\r\nuPGRADE:\r\nContent-Length: 14\r\n\r\n"
)
KEPT = HEAD.replace(b"Upgrade: h2c\r\n", b"").replace(b"uPGRADE:\r\n", b"")
BODY = b"\r\nupgrade: x\r\n"


def fed(pieces: list[bytes]) -> bytes:
    """What passes of a head that comes in ``pieces``, and of the body that comes with its last piece."""
    lines = UpgradeFilter()
    return b"".join(lines.feed(piece) for piece in pieces)


@given(st.lists(st.integers(0, len(HEAD)), max_size=8))
def test_any_cut_gives_the_same(cuts: list[int]) -> None:
    """Upgrade lines go, all else stays byte for byte, in whatever pieces the head comes."""
    edges = [0, *sorted(cuts), len(HEAD)]
    pieces = [HEAD[start:end] for start, end in pairwise(edges)]
    assert fed(pieces) == KEPT


def test_body_behind_the_head_passes_as_it_is() -> None:
    """What follows the head in one piece is not looked at."""
    assert fed([HEAD + BODY]) == KEPT + BODY
    plain = HEAD.replace(b"pgrade", b"xgrade").replace(b"uPGRADE", b"uXGRADE")
    assert fed([plain + BODY]) == plain + BODY


def test_next_request_is_looked_at_too() -> None:
    """A connection's second head is filtered like its first, blank lines before it or not."""
    assert fed([HEAD, b"\r\n" + HEAD]) == KEPT + b"\r\n" + KEPT
