"""Takes ``Upgrade`` lines out of a request's head as it arrives. Pure.

A server may ignore the wish for another protocol (RFC 9110, 7.8), and we speak HTTP/1.1 alone. But httptools ends a
request with that header right after its head and loses the body. Java's HttpClient sends ``Upgrade: h2c`` with every
request unless it is told otherwise.
"""

import re

_LINE = re.compile(rb"^upgrade:", re.IGNORECASE | re.MULTILINE)
_NAME = b"upgrade:"


class UpgradeFilter:
    """The head of one request after the other, in pieces of any size."""

    def __init__(self) -> None:
        self._held = b""  # the beginning of a line that may become an Upgrade line
        self._begun = False  # there was a line: the next empty one ends the head
        self._within = False  # what was passed on ended within a line

    def feed(self, data: bytes) -> bytes:
        """What of ``data`` may pass; what follows the head passes as it is."""
        if not (self._held or self._begun or self._within):
            end = data.find(b"\r\n\r\n")
            if end > 0 and _LINE.search(data, 0, end) is None:
                return data
        return b"".join(self._lines(self._held + data))

    def _lines(self, data: bytes) -> list[bytes]:
        passed = []
        self._held = b""
        while data:
            line, feed, data = data.partition(b"\n")
            if not feed:
                if not self._within and _NAME.startswith(line[: len(_NAME)].lower()):
                    self._held = line
                    break
                self._within = True
                passed.append(line)
                break
            if self._within:
                self._within = False
            elif line.strip() == b"":
                if self._begun:
                    self._begun = False
                    passed += [line, feed, data]
                    break
            elif line[: len(_NAME)].lower() == _NAME:
                continue
            self._begun = True
            passed += [line, feed]
        return passed
