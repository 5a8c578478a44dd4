"""Records the MD5 of a binary in the manifest and changes nothing else in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise

from bin_proxy.config.manifest import entries_of
from bin_proxy.config.trust import read_trusted
from bin_proxy.errors import UsageError, host_error
from bin_proxy.host.files import write_atomically

_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'


# In JSON, every string; with its value where it is the key of a string or null.
_MEMBER = re.compile(rf"({_STRING})(?:\s*:\s*({_STRING}|null))?")


def record_md5s(path: str, digests: Mapping[str, str]) -> None:
    """Write the MD5 of binaries into the `currentMd5` that their entries have; every other byte stays.

    The manifest is read anew, and looked at again right before it is replaced, so an edit made meanwhile stays.

    Args:
        path: the manifest; where it is a symbolic link, the link stays.
        digests: by binary name. An entry without `currentMd5`, or a name that has gone, is passed over.

    Raises:
        HostError: it cannot be read, understood or written; it is as it was.
    """
    try:
        if not any(_recorded(os.path.realpath(path, strict=True), digests) for _ in range(5)):
            raise ValueError("it keeps changing")
    except (OSError, ValueError, UsageError) as error:
        raise host_error(f"record the new MD5 in manifest {path}", error) from error


def _recorded(path: str, digests: Mapping[str, str]) -> bool:
    def look() -> tuple[int, str]:
        return os.stat(path).st_ctime_ns, read_trusted("BIN_MANIFESTS", path)

    before = look()
    new = _with_md5s(before[1], digests)
    return new == before[1] or write_atomically(path, new.encode(), like=path, still=lambda: look() == before)


def _with_md5s(text: str, digests: Mapping[str, str]) -> str:
    values = [found.span(2) for found in _MEMBER.finditer(text) if found[2] and json.loads(found[1]) == "currentMd5"]
    # Every second piece is the value of a currentMd5. Some are not of an entry but of what is unknown to us: with its
    # number in the place of each, parsing tells which is where.
    pieces = [text[begin:end] for begin, end in pairwise([0, *(at for span in values for at in span), len(text)])]
    numbered = "".join(f'"{at}"' if at % 2 else piece for at, piece in enumerate(pieces))
    for entry in entries_of(numbered):
        if isinstance(entry, dict) and isinstance(entry.get("currentMd5"), str) and str(entry.get("name")) in digests:
            pieces[int(entry["currentMd5"])] = json.dumps(digests[str(entry["name"])])
    return "".join(pieces)
