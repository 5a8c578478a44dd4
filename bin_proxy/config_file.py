"""Reads the config file that cron used to source: `[export] NAME=value` lines, as data, never executed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?)=(.*)", re.S)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPENS = {"if", "case", "while", "until", "for", "select", "{"}
_CLOSES = {"fi", "esac", "done", "}"}
# From here on only a shell knows what still counts.
_ENDS_ALL = {"return", "exit", "function"}


@dataclass(frozen=True)
class Assignment:
    """One `NAME=value`; `value` is None where only a shell could work it out."""

    name: str
    value: str | None
    line: int


@dataclass
class _Word:
    """One word, unquoted."""

    text: str = ""
    literal: bool = True
    plain_name: bool = True  # nothing before the first = is quoted, which would make it a command for a shell


@dataclass
class _Command:
    """One simple command."""

    line: int
    words: list[_Word] = field(default_factory=list)
    alone: bool = True  # neither in a pipe or list, nor in the background
    open: bool = False  # no shell would take it so, or it goes on below in a way that only a shell understands


def _commands(text: str) -> Iterator[_Command]:
    """Split shell text into simple commands of words."""
    command, word = _Command(1), None
    at, line, quote, depth, ticks = 0, 1, "", 0, 0
    while at < len(text):
        char, following = text[at], text[at + 1 : at + 2]
        at += 1
        line += char == "\n"
        ends = not quote and char in ";&|\n"
        if char == "\\" and following == "\n" and quote != "'":
            at, line = at + 1, line + 1
        elif not quote and char == "#" and word is None:
            at = (text.find("\n", at) + 1 or len(text) + 1) - 1
        elif ends or (not quote and char in " \t\r"):
            command.words += [word] if word else []
            word = None
            if ends:
                command.alone &= char in ";\n"
                doubled = char in "&|" and text[at - 2 : at - 1] == char
                no_command = char != "\n" and not command.words and not doubled
                command.open |= depth != 0 or ticks % 2 > 0 or no_command
                yield command
                after_sign = not command.words and not command.alone and char == "\n"  # the list goes on below
                command = _Command(line, alone=char in ";\n" and not after_sign)
        else:
            word = word or _Word()
            escapes = char == "\\" and (not quote or (quote == '"' and following in list('$`"\\')))
            if escapes or (char in "'\"" and quote in ("", char)):
                word.plain_name &= "=" in word.text
                word.text += following if escapes else ""
                word.literal &= not escapes or bool(following)
                at += escapes
                quote = quote if escapes else "" if quote else char
                continue
            if quote != "'" and char in "$`":
                word.literal = False
                ticks += char == "`"
            if not quote:
                # An unquoted tilde at the start of a value, a subshell and a redirection are a shell's business too.
                word.literal &= char not in "()<>" and not (char == "~" and word.text.endswith(("=", ":")))
                depth += (char == "(") - (char == ")")
                command.open |= char == "<" == following
            word.text += char
    command.words += [word] if word else []
    command.open |= depth != 0 or ticks % 2 > 0 or bool(quote)
    yield command


def parse_config(text: str) -> list[Assignment]:
    """Find every assignment in a config file, in order; the last one of a name is the one that counts.

    Args:
        text: the whole file.

    Returns:
        the assignments; one whose value cannot be known without a shell (`$…`, backticks, an open quote, a condition
        around it, a command behind it, blanks around `=`) has the value None.
    """
    found, nested, lost = [], 0, False
    for command in _commands(text):
        first = command.words[0].text if command.words else ""
        nested += (first in _OPENS) + (first.endswith("()") or first == "function" or "{" in first[1:])
        exported = first == "export"
        words = command.words[exported:]
        matches = [_ASSIGNMENT.fullmatch(word.text) if word.plain_name or exported else None for word in words]
        plain = command.alone and not nested and not lost and (exported or all(matches))
        for position, (word, match) in enumerate(zip(words, matches, strict=True)):
            if match:
                known = plain and word.literal and not match[2] and not command.open
                found.append(Assignment(match[1], match[3] if known else None, command.line))
            elif position == 1 and not exported and word.text[:1] == "=" and _NAME.fullmatch(first):
                found.append(Assignment(first, None, command.line))  # a blank before the sign
        if command.open:  # a shell may refuse the whole line
            found = [replace(one, value=None) if one.line == command.line else one for one in found]
        lost |= command.open or first in _ENDS_ALL
        nested -= sum(word.text in _CLOSES for word in words[:1])
    return found
