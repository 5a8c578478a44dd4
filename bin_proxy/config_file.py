"""Reads the config file that cron used to source: `[export] NAME=value` lines, as data, never executed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# What is worked out at run time, between double quotes too; of the substitutions those whose end is beyond doubt.
_RUN_TIME = r"""\$\(\(?(?:[^()'"`\\\#\n<]|'[^'\n]*'|"[^"$`\\\n]*")*\)?\)|\$\{[^{}'"`\\$\n]*\}|`[^`\\]*`|\$(?![({])"""
_TOKEN = re.compile(
    rf"""
    (?P<stray> (?<![^;&|\n]) [ \t]* [;&|] )  # a sign without a command before it
    | (?: [ \t] | \\\n )+ | \#[^\n]*
    | (?P<sign> & (?!&) | (?: && | \|\|? ) (?: [ \t\n] | \\\n | \#[^\n]* )* )
    | (?P<end> [;\n] | \Z )
    | (?P<word> (?: [A-Za-z_][A-Za-z0-9_]* [ \t]+ (?==) )? (?:
        [^ \t\n;&|<>()$`"'\\~] | (?<![=:\n])~ | \\. | '[^']*' | " (?: [^"\\$`] | \\. )* "
        # The tilde of a home folder, redirections and the head of a function are a shell's business, too.
        | (?P<shell> ~ | [<>](?![ \t]*[<;|\n]) | \(\)(?=\s+\{{\s) | {_RUN_TIME}
            | " (?: [^"\\$`] | \\. | {_RUN_TIME} )* " )
        | (?P<lost> [()<>$`"'\\] )
    )+ )
    """,
    re.X | re.S,
)
_QUOTED = re.compile(r"""\\\n|\\(.)|'([^']*)'|"((?:[^"\\]|\\.)*)\"""", re.S)
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)([ \t]*\+?)=")
# Words only where a command begins.
_OPENS = {"if", "while", "until", "for", "select", "function"}
_BEGINS = {"if", "while", "until", "then", "do", "else", "elif", "!", "time", "{"}
_CLOSES = {"fi", "done", "}"}


@dataclass(frozen=True)
class Assignment:
    """One `NAME=value`; `value` is None where only a shell could work it out."""

    name: str
    value: str | None
    line: int


def _unquoted(word: str) -> str:
    return _QUOTED.sub(lambda found: found[1] or found[2] or re.sub(r'\\(?:\n|([$`"\\]))', r"\1", found[3] or ""), word)


def parse_config(text: str) -> list[Assignment]:
    """Find every assignment in a config file, in order; the last one of a name is the one that counts.

    Args:
        text: the whole file.

    Returns:
        the assignments; one whose value cannot be known without a shell (`$…`, backticks, an open quote, a condition
        around it, a command behind it, blanks around `=`) has the value None.
    """
    found: list[Assignment] = []
    words: list[tuple[str, bool, int]] = []
    line, depth, begun, alone, lost, starts = 1, 0, 0, True, False, {0}
    for token in _TOKEN.finditer(text.replace("\r\n", "\n")):
        if token["word"]:
            words.append((token["word"], token["shell"] is None, line))
        line += token[0].count("\n")
        if token["sign"]:  # a part of a list or pipe, or in the background
            alone = False
            starts.add(len(words))
        lost |= bool(token["lost"] or token["stray"])
        if token["end"] is None:
            continue
        raws = [word for word, _, _ in words]
        depth += sum(raw in _OPENS and (at in starts or raws[at - 1] in _BEGINS) for at, raw in enumerate(raws))
        depth += sum(
            raw in ("return", "exit", "{") for raw in raws
        )  # nothing closes these: only a shell knows what counts
        # A name that is quoted, if only in part, makes the word a command, though not behind an export.
        exported = raws[:1] == ["export"]
        names = [_NAME.match(_unquoted(raw) if exported else raw.replace("\\\n", "")) for raw in raws]
        known = alone and not depth and (exported or all(name and not name[2] for name in names))
        for name, (word, literal, at) in zip(names, words, strict=True):
            if name:
                value = _unquoted(word).partition("=")[2] if known and literal and not name[2] else None
                found.append(Assignment(name[1], value, at))
        if lost:  # a shell may refuse the whole line
            found[begun:] = [replace(one, value=None) for one in found[begun:]]
        if token["end"] != ";":
            begun = len(found)
        depth -= sum(raw in _CLOSES for raw in raws[:1])
        words, alone, starts = [], True, {0}
    return found
