"""Reads the config file that cron used to source: `[export] NAME=value` lines, as data, never executed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENDS_COMMAND = ";&|\n"


@dataclass(frozen=True)
class Assignment:
    """One `NAME=value`; `value` is None where only a shell could work it out."""

    name: str
    value: str | None
    line: int


@dataclass
class _Word:
    text: str = ""
    literal: bool = True


def _commands(text: str) -> Iterator[tuple[int, list[_Word]]]:
    """Split shell text into commands of words, with the line at which each command starts."""
    at, line, start = 0, 1, 1
    words: list[_Word] = []
    word: _Word | None = None
    quote = ""
    while at < len(text):
        char, following = text[at], text[at + 1 : at + 2]
        at += 1
        line += char == "\n"
        if quote == "'" and char != "'":
            word = word or _Word()
            word.text += char
        elif char == "\\" and following == "\n":
            at, line = at + 1, line + 1
        elif char == "\\" and (not quote or (following and following in '$`"\\')):
            word = word or _Word()
            word.text += following
            at += 1
        elif char in "'\"" and quote in ("", char):
            word = word or _Word()
            quote = "" if quote else char
        elif quote:
            word = word or _Word()
            word.literal &= char not in "$`"
            word.text += char
        elif char == "#" and word is None:
            at = (text.find("\n", at) + 1 or len(text) + 1) - 1
        elif char in " \t\r" or char in _ENDS_COMMAND:
            if word is not None:
                words.append(word)
                word = None
            if char in _ENDS_COMMAND:
                yield start, words
                words, start = [], line
        else:
            word = word or _Word()
            # An unquoted tilde at the start of a value, a subshell and a redirection are a shell's business too.
            tilde = char == "~" and word.text.endswith("=")
            word.literal &= char not in "$`()<>" and not tilde
            word.text += char
    if word is not None:
        word.literal &= not quote
        words.append(word)
    yield start, words


def parse_config(text: str) -> list[Assignment]:
    """Find every assignment in a config file, in order; the last one of a name is the one that counts.

    Args:
        text: the whole file.

    Returns:
        the assignments; one whose value cannot be known without a shell (`$…`, backticks, an open quote, a command
        behind it, blanks around `=`) has the value None.
    """
    found = []
    for line, words in _commands(text):
        exported = bool(words) and words[0].text == "export"
        words = words[exported:]
        pairs = [(word, *word.text.partition("=")) for word in words]
        plain = exported or all(sign for _, _, sign, _ in pairs)
        for position, (word, name, sign, value) in enumerate(pairs):
            bare = name.removesuffix("+")
            if not _NAME.fullmatch(bare) or (not sign and (exported or position)):
                continue
            known = plain and sign and bare == name and word.literal
            found.append(Assignment(bare, value if known else None, line))
    return found
