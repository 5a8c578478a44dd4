"""Reads the config file that cron used to source: `[export] NAME=value` lines, as data, never executed."""

from __future__ import annotations

import re

# What a shell works out, between double quotes too; of the substitutions those whose end is beyond doubt.
_RUN_TIME = (
    r"""\$(?![({']) | \$\{[^{}'"`\\$\n]*\} | `[^`'"\\\n]*` | \$\( (?:[^()'"`\\\#<\n]|'[^'\n]*'|"[^"$`\\\n]*")* \)"""
)
_TOKEN = re.compile(
    rf"""
    (?: [ \t] | \\\n )+ | \#[^\n]* | export [ \t]+
    | (?P<sign> [;\n>] | \Z | <(?!<) | & (?!&) | (?: && | \|[|&]? ) (?: [ \t\n] | \\\n | \#[^\n]* )* )
    | (?P<word> (?: \w+ [ \t]+ (?==) )? (?:
        [^ \t\n;&|<>()$`"'\\~] | (?<![=:\n])~ | \\. | '[^']*' | " (?: [^"\\$`] | \\. )*"
        | (?P<shell> ~ | {_RUN_TIME} | " (?: [^"\\$`] | \\. | {_RUN_TIME} )* " )
    )+ )
    | (?P<lost> . )  # an open quote, a parenthesis, a here-document
    """,
    re.X | re.S,
)
_QUOTED = re.compile(r"""\\\n|\\(.)|'([^']*)'|"((?:[^"\\]|\\.)*)\"""", re.S)
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)([ \t]*\+?)=")
# Where one of these begins a command, only a shell knows which of the commands that follow count.
_COMPOUND = {"if", "while", "until", "for", "select", "case", "function", "{", "!", "time", "return", "exit"}


def _unquoted(word: str) -> str:
    return _QUOTED.sub(lambda found: found[1] or found[2] or re.sub(r'\\(?:\n|([$`"\\]))', r"\1", found[3] or ""), word)


def parse_config(text: str) -> dict[str, tuple[str | None, int]]:
    """Find what a config file assigns.

    Args:
        text: the whole file.

    Returns:
        by name, of the last assignment, the value and the line. The value is None where it cannot be known without a
        shell: `$…`, backticks, an open quote, blanks around `=`, part of another command, or a condition, loop,
        function or subshell begins above it.
    """
    found: dict[str, tuple[str | None, int]] = {}
    words: list[tuple[str, bool, int]] = []
    line, lost, before = 1, False, ""
    for token in _TOKEN.finditer(text.replace("\r\n", "\n")):
        if token["word"]:
            words.append((token["word"], token["shell"] is None, line))
        line += token[0].count("\n")
        lost = lost or token["lost"] is not None
        sign = token["sign"]
        if sign is None:
            continue
        lost = lost or any(word in _COMPOUND for word, _, _ in words[:1])
        named = [(_NAME.match(_unquoted(word)), word, literal, at) for word, literal, at in words]
        alone = {before, sign} <= {"", ";", "\n"}  # neither piped nor in the background nor under a condition
        # Behind quotes a name is a command, and the words that follow are its arguments.
        plain = (
            alone and not lost and all(name and not name[2] and word.startswith(name[0]) for name, word, *_ in named)
        )
        for name, word, literal, at in named:
            if name:
                found[name[1]] = (_unquoted(word).partition("=")[2] if plain and literal else None, at)
        words, before = [], sign
    return found
