"""The config file that cron used to source: what is read as data must be what a shell would have made of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bin_proxy.config.config_file import parse_config
from tests.host import Host

SHELLS = [shell for shell in ("/bin/sh", shutil.which("dash"), shutil.which("bash")) if shell]
SHELLS = sorted({os.path.realpath(shell) for shell in SHELLS})


def parsed(text: str) -> dict[str, str | None]:
    """What counts of a config file: the last assignment of each name."""
    return {name: value for name, (value, _) in parse_config(text).items()}


def sourced(text: str, shell: str = "/bin/sh") -> dict[str, str] | None:
    """What a real shell makes of the file; None where it refuses to read it to its end."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config")
        file.write_bytes(text.encode())
        # bash is asked to behave as sh does; no PATH, so that no word of the file is a program.
        script = 'set -a; . "$1" >/dev/null; exec /usr/bin/env -0'
        command = [shell, *(["--posix"] if shell.endswith("bash") else []), "-c", script, "sh", str(file)]
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, env={"PATH": "/nowhere"}, cwd=folder, timeout=20
        )
    if done.returncode != 0 or b" unexpected " in done.stderr:  # a syntax error, at which bash goes on
        return None
    pairs = [pair.partition("=") for pair in done.stdout.decode(errors="surrogateescape").split("\0") if pair]
    return {name: value for name, _, value in pairs if name not in ("PATH", "PWD", "OLDPWD", "SHLVL", "_")}


def agree(text: str) -> None:
    """Whatever the parser takes for a literal value is what every shell makes of it."""
    literal = {name: value for name, value in parsed(text).items() if value is not None}
    for shell in SHELLS:
        found = sourced(text, shell)
        if found is not None:
            assert {name: found.get(name) for name in literal} == literal, (text, shell)


CASES = [
    ("A=1", {"A": "1"}),
    ("export A=1", {"A": "1"}),
    ("  export   A=1  ", {"A": "1"}),
    ("\tA=1\t", {"A": "1"}),
    ("export A=1 B=2", {"A": "1", "B": "2"}),
    ("A=1 B=2", {"A": "1", "B": "2"}),
    ("A=1;B=2", {"A": "1", "B": "2"}),
    ("A=1; B=2 ; export C=3;", {"A": "1", "B": "2", "C": "3"}),
    ("A=", {"A": ""}),
    ("A=''", {"A": ""}),
    ('A=""', {"A": ""}),
    ("A='single quoted'", {"A": "single quoted"}),
    ('A="double quoted"', {"A": "double quoted"}),
    ("A=one' two '\"three \"four", {"A": "one two three four"}),
    ("A='it'\\''s'", {"A": "it's"}),
    ("A=a\\ b", {"A": "a b"}),
    ('A="a\\"b\\\\c\\$d\\`e"', {"A": 'a"b\\c$d`e'}),
    ('A="a\\b"', {"A": "a\\b"}),
    ("A='a\\b$c`d\"'", {"A": 'a\\b$c`d"'}),
    ("A=a\\\nb", {"A": "ab"}),
    ('A="a\\\nb"', {"A": "ab"}),
    ("A='a\nb'", {"A": "a\nb"}),
    ("export \\\n  A=1 \\\n  B=2\nC=3", {"A": "1", "B": "2", "C": "3"}),
    ("# A=0\nA=1 # B=2\n#C=3\nD=a#b\nE='#'", {"A": "1", "D": "a#b", "E": "#"}),
    ("A=1 # it's a comment\nB=2", {"A": "1", "B": "2"}),
    ("A=1 #\\\nB=2", {"A": "1", "B": "2"}),
    ("A=1\nA=2\n", {"A": "2"}),
    ("A=1\n\n\n  \nB=2", {"A": "1", "B": "2"}),
    ("A=a=b==c", {"A": "a=b==c"}),
    ("A=http://h:8080/api/v1?x=y", {"A": "http://h:8080/api/v1?x=y"}),
    ("A=*.?[ab]", {"A": "*.?[ab]"}),
    ("A=ü€😀", {"A": "ü€😀"}),
    ("A=-c,%+@_./:!", {"A": "-c,%+@_./:!"}),
    ('A="supervisorctl -c /etc/supervisord.conf"', {"A": "supervisorctl -c /etc/supervisord.conf"}),
    ("_A9=1", {"_A9": "1"}),
    ("9A=1", {}),
    ("A-B=1", {}),
    ("A=1 =", {}),
    ("A=1 9B=2", {}),
    ("export A", {}),
    ("umask 022\nA=1", {"A": "1"}),
    ("set -a\nA=1\nB=2", {"A": "1", "B": "2"}),
    ("echo settings for manager while waiting\nA=1", {"A": "1"}),
    ("[ -t 1 ] || : waiting for bin-manager\nA=1", {"A": "1"}),
]


@pytest.mark.parametrize(("text", "wanted"), CASES)
def test_what_is_literal_is_read_as_the_shell_reads_it(text: str, wanted: dict[str, str]) -> None:
    """Exports, quoting, comments, continuation lines and `;` mean what they mean to a real shell."""
    assert {name: value for name, value in parsed(text).items() if value is not None} == wanted
    for shell in SHELLS:
        found = sourced(text, shell)
        if found is not None:  # a word that is no command ends bash's reading
            assert {name: found.get(name) for name in wanted} == wanted, shell


SHELL_ONLY = [
    "A=$HOME",
    "A=${HOME}",
    "A=a$B",
    'A="$HOME/x"',
    'A="${B:-x}"',
    "A=$(hostname)",
    "A=`hostname`",
    'A="`hostname`"',
    "A=$((1+1))",
    "A=a$",
    "A=~",
    "A=~/x",
    "A=~root/x",
    "A=x:~/y",
    "A='open",
    'A="open',
    "A= b",
    "A = b",
    "A =b",
    "A+=b",
    "A=1 true",
    "A=(a b)",
    "A=a>b",
    "A=a <b",
    "A=$'x'",
]


@pytest.mark.parametrize("text", SHELL_ONLY)
@pytest.mark.parametrize("export", ["", "export "])
@pytest.mark.parametrize("before", ["", "A=earlier\n"])
def test_what_only_a_shell_could_work_out_is_never_guessed(text: str, export: str, before: str) -> None:
    """Expansions, substitutions, open quotes and commands behind the value make it unknown, or what the shell says."""
    found = parsed(before + export + text)
    if found.get("A") is not None:
        agree(before + export + text)
    if not export:
        assert found["A"] is None


@pytest.mark.parametrize(
    "text", ["A=a&b", "A=1 & B=2", "A=http://h/x?a=1&B=2", "A=1 | true", "true | A=1", "A=1 & true", "true |&\nA=1"]
)
def test_what_a_subshell_sets_is_not_taken_for_a_value(text: str) -> None:
    """An unquoted & or | sends the assignment into a subshell, which cannot set anything."""
    agree("A=before\n" + text)


@pytest.mark.parametrize(
    "text",
    [
        "false && A=1",
        "true || A=1",
        "if false; then A=1; fi",
        "if false\nthen\nA=1\nfi",
        "if false; then\n  A=1\nelse\n  A=2\nfi",
        "if false; then\n  export A=1\nfi",
        "while false\ndo\nA=1\ndone",
        "for x in\ndo\nA=1\ndone",
        "case x in\ny)\nA=1\n;;\nesac",
        "f() {\nA=1\n}",
        "f()\n{\nA=1\n}",
        "(\nA=1\n)",
        "( A=1 )",
        "B=$(\nA=1\n)",
        "B=`\nA=1\n`",
        'B="$(\nA=1\n)"',
        ": <<END\nA=1\nEND",
        ": <<'END'\nA=1\nEND",
        "return\nA=1",
        "! A=1",
        "{ A=1; }",
        "false &&\nA=1",
        "true ||\n\nA=1",
    ],
)
def test_what_a_shell_would_do_under_a_condition_is_not_taken_for_done(text: str) -> None:
    """An assignment inside an if, loop, function, subshell or here-document is not read as if it always applied."""
    agree("A=before\n" + text)


@pytest.mark.parametrize(
    "text", ['"A"=1', "'A'=1", "A\\B=1", "A''=1", "A'='1", "\\A=1", "A\\=1", '"A=1"', "'export A=1'", "\\A=export A="]
)
@pytest.mark.parametrize("export", ["", "export "])
def test_a_quoted_name_is_what_the_shell_takes_it_for(text: str, export: str) -> None:
    """A word is an assignment only where a shell thinks so: behind quotes it is a command."""
    agree("A=before\nAB=before\n" + export + text)


def test_a_file_with_carriage_returns_is_read_as_if_it_had_none() -> None:
    """CRLF line ends, which an editor on Windows leaves, belong to no value."""
    text = "# comment\r\nexport A=1\r\nB='two words'\r\nC=\r\nD=x # y\r\n\r\nE=\"q\"; F=2\r\n"
    assert parsed(text) == {"A": "1", "B": "two words", "C": "", "D": "x", "E": "q", "F": "2"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A=$x", 1),
        ("\n\nA=$x\n", 3),
        ("# c\r\n\r\nA=$x\r\n", 3),
        ("B=1 \\\n C=2\nA=$x", 3),
        ("B='a\nb\nc'\nA=$x", 4),
        ("B=1; A=$x", 1),
        ("B=1\n# it's\nA=$x", 3),
        ('B="a\\\nb"\n\nA=$x', 4),
    ],
)
def test_the_line_of_a_value_is_told_as_an_editor_counts_it(text: str, line: int) -> None:
    """Comments, continuation lines and values over several lines do not shift the number."""
    assert parse_config(text)["A"] == (None, line)


# Any literal text

_bare = st.text(st.sampled_from("abcXYZ019_./:,@%+-=!^*?[]#~é€"), min_size=1, max_size=8)
_any = st.text(
    st.characters(min_codepoint=32, exclude_categories=["Cs", "Cn"]) | st.sampled_from("\n\t$`\"'\\#;&|"), max_size=8
)
_piece = st.one_of(
    _bare,
    _any.map(lambda text: "'" + text.replace("'", "") + "'"),
    _any.map(lambda text: '"' + re.sub(r'(["\\`])', r"\\\1", text).replace("$", "$x") + '"'),
    _any.map(lambda text: '"' + text.replace('"', "").replace("$", "\\$").replace("`", "\\`") + '"'),
    st.characters(min_codepoint=32, max_codepoint=126).map(lambda char: "\\" + char),
    st.just("\\\n"),
    st.just('""'),
)
_value = st.lists(_piece, max_size=4).map("".join)
_name = st.sampled_from(["A", "B", "_c9", "JOBS"])
_assignment = st.tuples(_name, _value).map("=".join)
_line = st.one_of(
    _assignment,
    _assignment.map("export {}".format),
    st.tuples(_assignment, _assignment).map(" ".join),
    st.tuples(_assignment, st.sampled_from([" ", "\t", ""]), _assignment).map(lambda t: f"{t[0]}{t[1]};{t[1]}{t[2]}"),
    st.tuples(_assignment, _any.filter(lambda text: "\n" not in text)).map(lambda t: f"  {t[0]} #{t[1]}"),
    st.sampled_from(["", "#", "# it's \"a $comment", "   ", "\t# x"]),
)
_files = st.lists(_line, max_size=5).map("\n".join)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_files, st.sampled_from(["", "\n"]))
def test_whatever_the_parser_calls_literal_is_what_the_shell_says(text: str, end: str) -> None:
    """For any file of assignments: a value that is not refused is the value that sourcing the file would give."""
    agree(text + end)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    st.lists(
        st.sampled_from(
            [
                "A=",
                "B=",
                "export ",
                "a",
                "1",
                "'",
                '"',
                "\\",
                " ",
                "\t",
                "\n",
                ";",
                "#",
                "$",
                "`",
                "~",
                ":",
                "&",
                "|",
                "*",
                "!",
                "=",
            ]
        ),
        max_size=14,
    ).map("".join)
)
def test_whatever_the_parser_makes_of_noise_is_what_the_shell_says(text: str) -> None:
    """For any mixture of the shell's own signs, too: the parser refuses, or says what the shell says."""
    assume("`export" not in text)  # what it prints is then executed
    assume(any(value is not None for value in parsed(text).values()))
    agree(text)


# Through the command line


def test_a_value_that_needs_a_shell_ends_with_its_line_and_touches_nothing(host: Host) -> None:
    """Exit 2, one line for each such value with its file and line; bin-manager is not asked."""
    host.write_manifest({"name": "tool", "service": False})
    config = host.root / "config"
    config.write_text("# settings\nexport JOBS=$(nproc)\n\nMIN_HEALTHY_SECONDS=`date +%S`\nUNKNOWN=$x\n")
    host.settings.pop("MIN_HEALTHY_SECONDS")
    done = host.sync()
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert f"{config}:2: JOBS" in lines[0] + lines[1] and f"{config}:4: MIN_HEALTHY_SECONDS" in lines[0] + lines[1]
    assert host.server.requests == []
    assert not host.state.exists() and not host.log_path.exists()


def test_the_option_or_the_environment_supplies_what_the_file_cannot(host: Host) -> None:
    """A value that needs a shell is no fault where the command line or the environment says what it is."""
    host.write_manifest({"name": "tool", "service": False})
    host.server.publish("tool", b"tool 1")
    (host.root / "config").write_text("JOBS=$(nproc)\nBIN_DIR=$HOME/bin\n")
    host.settings.pop("BIN_DIR")
    assert host.sync(JOBS="2").returncode == 2
    done = host.run("--bin-dir", str(host.bin), "sync", JOBS="2")
    assert (done.returncode, done.stderr) == (0, "")
    assert (host.bin / "tool").read_bytes() == b"tool 1"


def test_nothing_of_the_file_is_ever_executed(host: Host) -> None:
    """The file is data: not even a command outside of any known value runs."""
    host.write_manifest({"name": "tool", "service": False})
    host.server.publish("tool", b"tool 1")
    witness = host.root / "witness"
    (host.root / "config").write_text(f"touch {witness}\nUNKNOWN=$(touch {witness})\nOTHER=`touch {witness}`\n")
    assert host.sync().returncode == 0
    assert not witness.exists()
