"""Fetch one file of a package index through pip's own session, and check its sha256.

fetch_pypi.py PROJECT FILE SHA256 DESTINATION

The stand-in's `fetchPypi`. The real one builds an address in the index's stable layout, which not
every mirror serves; this asks the index page for the file, as pip does.
"""

import hashlib
import re
import sys
import time
from html import unescape
from pathlib import Path
from urllib.parse import urljoin

from pip._internal.models.index import PyPI
from pip._internal.network.session import PipSession

TRIES = 3


def fetch(project: str, file: str, sha256: str, destination: Path) -> None:
    """Write `file` to `destination`; SystemExit with a sentence when it is absent or another file."""
    session = PipSession(retries=5)
    page = session.get(f"{PyPI.simple_url}/{project.replace('_', '-').lower()}/")
    page.raise_for_status()
    links = {
        unescape(m[2]): unescape(m[1])
        for m in re.finditer(r'<a\b[^>]*href="([^"#]+)[^>]*>([^<]+)</a>', page.text)
    }
    if file not in links:
        sys.exit(f"the index has no {file} of {project}: run `nix run .#update-pins`")
    digest = hashlib.sha256()
    with session.get(urljoin(page.url, links[file]), stream=True) as reply:
        reply.raise_for_status()
        with destination.open("wb") as out:
            for block in reply.iter_content(1 << 20):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != sha256:
        destination.unlink()
        sys.exit(
            f"hash mismatch in {file}: the pins say sha256 {sha256}, the index gave "
            f"{digest.hexdigest()}. If upstream replaced the file, find out why before "
            "running `nix run .#update-pins`."
        )


if __name__ == "__main__":
    for attempt in range(1, TRIES + 1):
        try:
            fetch(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
            break
        except OSError as error:
            if attempt == TRIES:
                sys.exit(f"cannot fetch {sys.argv[2]}: {error}")
            time.sleep(attempt)
