"""What a valid manifest is, and that recording an MD5 changes nothing else in it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck as Check
from hypothesis import given, settings
from hypothesis import strategies as st

from bin_proxy.config.manifest import load_manifest
from bin_proxy.config.settings import load_settings
from bin_proxy.errors import HostError, UsageError
from bin_proxy.policy.model import Binary
from bin_proxy.store.manifest_file import record_md5s
from tests.conftest import require, require_root
from tests.host import Host, eventually, md5

MD5 = "0123456789abcdef" * 2
SHA = "fedcba9876543210" * 2


def load(tmp_path: Path, text: str | bytes | dict[str, Any], **environ: str) -> tuple[Binary, ...]:
    """Load a manifest with this content."""
    path = tmp_path / "manifest.json"
    text = json.dumps(text) if isinstance(text, dict) else text
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    environ = {"BIN_MANIFESTS": str(path), "BIN_DIR": "/opt/bin", **environ}
    return load_manifest(load_settings({}, environ))


def entry(**more: Any) -> dict[str, Any]:
    return {"binaries": [{"name": "manager", **more}]}


def faults_of(tmp_path: Path, text: str | bytes | dict[str, Any]) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    return list(caught.value.faults)


# What is taken


def test_the_documented_manifest_is_taken_with_its_defaults(tmp_path: Path) -> None:
    """Name, version and currentMd5 are enough; everything else has its default."""
    [found] = load(tmp_path, '{"binaries": [{"name": "manager", "version": "latest", "currentMd5": ""}]}')
    assert (found.name, found.version, found.path) == ("manager", "latest", "/opt/bin/manager")
    assert (found.services, found.health, found.verify, found.reported) == (None, None, None, "")
    assert (found.min_healthy, found.health_timeout) == (5.0, 60.0)


def test_every_key_but_the_name_may_be_left_out(tmp_path: Path) -> None:
    """An entry of a name alone follows "latest" and has no currentMd5."""
    [found] = load(tmp_path, entry())
    assert (found.version, found.reported) == ("latest", None)
    assert load(tmp_path, '{"binaries": []}') == ()


GOOD: list[tuple[str, Any, str, Any]] = [
    ("version", "2.3.1", "version", "2.3.1"),
    ("version", "v1.0+build_7-rc.1", "version", "v1.0+build_7-rc.1"),
    ("version", "9" * 128, "version", "9" * 128),
    ("path", "/opt/x/manager bin", "path", "/opt/x/manager bin"),
    ("path", "/ü/€", "path", "/ü/€"),
    ("service", False, "services", ()),
    ("service", "web", "services", ("web",)),
    ("service", "web:one", "services", ("web:one",)),
    ("service", "web:*", "services", ("web:*",)),
    ("service", ["a", "b:c", "d:*"], "services", ("a", "b:c", "d:*")),
    ("healthCheck", {"command": ["/usr/local/bin/manager", "ping"]}, "health", ("/usr/local/bin/manager", "ping")),
    ("healthCheck", {"command": ["/bin/sh", "-c", "a\nb"]}, "health", ("/bin/sh", "-c", "a\nb")),
    ("healthCheck", {"tcp": "127.0.0.1:8080"}, "health", "127.0.0.1:8080"),
    ("healthCheck", {"tcp": "[::1]:8080"}, "health", "[::1]:8080"),
    ("healthCheck", {"tcp": "localhost:65535"}, "health", "localhost:65535"),
    ("healthCheck", {"http": "http://127.0.0.1:8080/health"}, "health", "http://127.0.0.1:8080/health"),
    ("healthCheck", {"http": "https://h/x?y=z"}, "health", "https://h/x?y=z"),
    ("healthCheck", {"_comment": "ask ops", "tcp": "h:80"}, "health", "h:80"),
    ("minHealthySeconds", 0, "min_healthy", 0.0),
    ("minHealthySeconds", 2.5, "min_healthy", 2.5),
    ("healthTimeout", 120, "health_timeout", 120.0),
    ("verifyCommand", ["{file}", "--version"], "verify", ("{file}", "--version")),
    ("currentMd5", MD5, "reported", MD5),
    ("currentMd5", "anything", "reported", "anything"),
    ("currentMd5", None, "reported", ""),
    ("unknown", {"deep": [1, None]}, "name", "manager"),
]


@pytest.mark.parametrize(("key", "value", "field", "wanted"), GOOD)
def test_what_is_documented_is_taken(tmp_path: Path, key: str, value: Any, field: str, wanted: Any) -> None:
    """Every documented form of every key, and keys that nobody knows."""
    [found] = load(tmp_path, entry(**{key: value}))
    got = getattr(found, field)
    assert (got.target if field == "health" else got) == wanted


def test_the_settings_are_the_defaults_of_an_entrys_own_times(tmp_path: Path) -> None:
    """MIN_HEALTHY_SECONDS and HEALTH_TIMEOUT hold where an entry says nothing of its own."""
    environ = {"MIN_HEALTHY_SECONDS": "7", "HEALTH_TIMEOUT": "8"}
    [found] = load(tmp_path, entry(), **environ)
    assert (found.min_healthy, found.health_timeout) == (7.0, 8.0)
    [found] = load(tmp_path, entry(minHealthySeconds=1, healthTimeout=2), **environ)
    assert (found.min_healthy, found.health_timeout) == (1.0, 2.0)


@pytest.mark.parametrize("name", ["a", "A", "0", "a.b_c+d-e", "x" * 128])
def test_good_names_are_taken(tmp_path: Path, name: str) -> None:
    """Letters, digits and . _ + - after a letter or digit, up to 128 characters."""
    assert load(tmp_path, {"binaries": [{"name": name}]})[0].name == name


# What is refused

_BAD_WORDS = [
    "",
    ".",
    "..",
    "-x",
    "_x",
    "+x",
    "a/b",
    "../x",
    "a b",
    "a\n",
    "a\x00",
    "ä",
    "x" * 129,
    "a:b",
    "a%2e",
    None,
]
_BAD_WORDS_2: list[Any] = [1, True, ["a"], {"a": 1}, "\ud800", "a\u200b", " a", "a "]
BAD: list[tuple[str, Any]] = [
    *(("name", value) for value in [*_BAD_WORDS, *_BAD_WORDS_2]),
    *(("version", value) for value in [*_BAD_WORDS, *_BAD_WORDS_2]),
    *(("path", value) for value in ["", "x", "./x", "/x/", "/", None, 7, ["/x"], "/a\nb", "/a\x00", "/\ud800"]),
    *(("service", value) for value in ["", " ", "a b", "a:b:c", ":a", "a:", "*", "a*", "a:b*", "a\n", True, None, 7]),
    *(("service", value) for value in [[], ["a", ""], ["a", 7], [["a"]], {}, {"a": "b"}, [False]]),
    *(
        ("healthCheck", value)
        for value in [None, {}, [], "x", True, {"udp": "h:1"}, {"tcp": "h:1", "http": "http://h"}]
    ),
    *(
        ("healthCheck", {"tcp": value})
        for value in ["", "h", "8080", "h:", ":80", "h:0", "h:65536", "h:x", "h:1/x", 80]
    ),
    *(("healthCheck", {"tcp": value}) for value in ["h :1", "::1:80", None, "[::1:80"]),
    *(
        ("healthCheck", {"http": value})
        for value in ["", "h:80", "ftp://h", "http://", "http://h:x/", "http://h:70000", 1]
    ),
    *(("healthCheck", {"http": value}) for value in ["http://h/a b", "http://[::1/", None, ["http://h"]]),
    *(("healthCheck", {"command": value}) for value in ["ping", [], [""], ["a", 1], ["a", None], None, {}, ["a\0"]]),
    *(
        (key, value)
        for key in ("minHealthySeconds", "healthTimeout")
        for value in [-1, "5", True, None, [5], 86401, {}]
    ),
    *(("verifyCommand", value) for value in ["{file}", [], [""], ["a", 1], None, {}, ["a\x00"], True]),
    *(("currentMd5", value) for value in [7, True, [], {}]),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_what_breaks_a_rule_is_refused_with_its_place(tmp_path: Path, key: str, value: Any) -> None:
    """A value that no rule allows is one fault that names the entry and the key."""
    [fault] = faults_of(tmp_path, {"binaries": [{"name": "good"}, {"name": "manager", key: value}]})
    assert "binaries[1]" in fault and key in fault
    assert fault.isprintable()


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1" + "0" * 400, "9" * 5000])
@pytest.mark.parametrize("key", ["minHealthySeconds", "healthTimeout"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, number: str, key: str) -> None:
    """Infinite, absurd and non-JSON numbers end in a fault, not in a traceback."""
    assert len(faults_of(tmp_path, f'{{"binaries": [{{"name": "m", "{key}": {number}}}]}}')) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "{", "[]", "null", "7", '"x"', "{}", '{"binaries": null}', '{"binaries": {}}', '{"binaries": "x"}'),
        *(
            '{"binaries": []} x',
            '{"binaries": [],}',
            "{'binaries': []}",
            '{"binaries": [] /* c */}',
            '{"Binaries": []}',
        ),
        *('{"binaries": [], "binaries": []}', '{"binaries": [{"name": "a", "name": "b"}]}', '{"binaries": [NaN]}'),
        *(
            '{"binaries": ["a"]}',
            '{"binaries": [[]]}',
            '{"binaries": [null]}',
            '{"binaries": [7]}',
            '{"binaries": [{}]}',
        ),
        *("[" * 100_000, '{"a":' * 100_000, '{"binaries": [' + '{"a":' * 50_000, '{"a": "\\ud8"}', '{"a": "\t"}'),
        *('{"x": {"a": 1, "a": 2}, "binaries": []}',),
    ],
    ids=lambda text: text[:24],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    """Anything but one JSON object with a list of objects, without duplicate keys, is one clear fault."""
    [fault] = faults_of(tmp_path, text)
    assert str(tmp_path / "manifest.json") in fault
    assert len(fault) < 600


@pytest.mark.parametrize("raw", [b"\xff\xfe", b'{"binaries": [{"name": "\xe4"}]}', '{"binaries": []}'.encode("utf-16")])
def test_what_is_no_utf8_is_refused(tmp_path: Path, raw: bytes) -> None:
    """The manifest is UTF-8, as JSON is."""
    [fault] = faults_of(tmp_path, raw)
    assert "utf-8" in fault


def test_a_manifest_that_is_absent_or_a_folder_is_said(tmp_path: Path) -> None:
    """One line, no traceback."""
    for path in (tmp_path / "absent.json", tmp_path, tmp_path / "absent" / "m.json"):
        with pytest.raises(UsageError) as caught:
            load_manifest(load_settings({}, {"BIN_MANIFESTS": str(path)}))
        assert len(caught.value.faults) == 1 and str(path) in str(caught.value)


def test_no_two_entries_share_a_name(tmp_path: Path) -> None:
    """A name that stands twice is told once for each entry too many."""
    faults = faults_of(tmp_path, {"binaries": [{"name": "a"}, {"name": "b"}, {"name": "a", "path": "/x/y"}]})
    assert len(faults) == 1 and "binaries[2] ('a')" in faults[0] and "shares a with binaries[0]" in faults[0]


@pytest.mark.parametrize("other", ["/opt/bin/a", "/opt//bin/a", "/opt/bin/./a", "/opt/x/../bin/a"])
def test_no_two_entries_share_a_file(tmp_path: Path, other: str) -> None:
    """However the path is written."""
    [fault] = faults_of(tmp_path, {"binaries": [{"name": "a"}, {"name": "b", "path": other}]})
    assert "binaries[1] ('b')" in fault and "shares /opt/bin/a with binaries[0]" in fault


def test_two_links_to_one_file_share_it(tmp_path: Path) -> None:
    """A symbolic link and its target, or two links to one target, are the same file."""
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "one").symlink_to("real")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    for first, second in (("real", "one"), ("one", "two"), ("two", "real")):
        paths = [{"name": name, "path": str(tmp_path / name)} for name in (first, second)]
        assert "share" in faults_of(tmp_path, {"binaries": paths})[0]


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    """An operator corrects a manifest in one go: faults of every entry, within entries and between them."""
    text = {
        "binaries": [
            {"name": "a/b", "version": "", "path": "x", "service": "", "healthCheck": {}, "minHealthySeconds": -1}
            | {"healthTimeout": "x", "verifyCommand": [], "currentMd5": 7},
            7,
            {"name": "twice"},
            {"name": "twice", "path": "/elsewhere"},
            {"name": "same", "path": "/elsewhere"},
            {"version": "1"},
        ]
    }
    faults = faults_of(tmp_path, text)
    keys = ["name", "version", "path", "service", "healthCheck", "minHealthySeconds", "healthTimeout", "verifyCommand"]
    for key in [*keys, "currentMd5"]:
        assert [fault for fault in faults if "binaries[0]" in fault and f": {key} must" in fault], key
    assert [fault for fault in faults if "binaries[1]" in fault]
    assert [fault for fault in faults if "shares twice with binaries[2]" in fault and "binaries[3]" in fault]
    assert [fault for fault in faults if "share" in fault and "/elsewhere" in fault and "binaries[4]" in fault]
    assert [fault for fault in faults if "binaries[5]" in fault]
    assert len(faults) == 13


def test_a_faulty_entry_does_not_hide_that_its_name_or_file_stands_twice(tmp_path: Path) -> None:
    """What is wrong between entries is listed together with what is wrong within one of them."""
    first = {"name": "a", "version": "no good"}
    for second, word in (({"name": "a"}, "shares a "), ({"name": "b", "path": "/opt/bin/a"}, "shares /opt/bin/a ")):
        faults = faults_of(tmp_path, {"binaries": [first, second]})
        assert [fault for fault in faults if "version" in fault] and [fault for fault in faults if word in fault]


def test_a_refused_manifest_is_exit_2_and_nothing_is_asked_or_touched(host: Host) -> None:
    """Refused whole: the entries without fault are not worked on either."""
    host.install("good", b"good 1")
    host.server.publish("good", b"good 2")
    twice = {"name": "good", "path": "/elsewhere/good"}
    host.write_manifest({"name": "good", "service": False}, {"name": "bad/", "version": "1 2"}, twice)
    before = {path: path.lstat().st_mtime_ns for path in host.root.rglob("*")}
    for arguments in (("sync",), ("sync", "--only", "good"), ("sync", "--dry-run"), ("sync", "--json")):
        done = host.run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 3
        assert all(str(host.manifest_path) in line for line in done.stderr.splitlines())
    assert host.server.requests == []
    assert {path: path.lstat().st_mtime_ns for path in host.root.rglob("*")} == before


# Recording changes the MD5 and nothing else

_space = st.text(st.sampled_from(" \t\n\r"), max_size=3)
_char = st.one_of(
    st.characters(min_codepoint=32, exclude_categories=["Cs"], exclude_characters='"\\'),
    st.sampled_from(['\\"', "\\\\", "\\/", "\\b", "\\n", "\\u00e9", "\\u0041", "\\ud83d\\ude00", "\\ud800", "\\uDC00"]),
)
_string = st.lists(_char, max_size=6).map(lambda chars: '"' + "".join(chars) + '"')
_number = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.sampled_from(["0", "-0", "0.10", "1E400", "1e-400", "1.0E+2", "123456789012345678901234567890.5", "9" * 100]),
)
_scalar = st.one_of(_string, _number, st.sampled_from(["true", "false", "null"]))


def _spell(word: str) -> st.SearchStrategy[str]:
    """A JSON string that means `word`, some of its letters escaped."""
    ways = [st.sampled_from([char, f"\\u{ord(char):04x}", f"\\u{ord(char):04X}"]) for char in word]
    return st.tuples(*ways).map(lambda chars: '"' + "".join(chars) + '"')


@st.composite
def _json(draw: st.DrawFn, depth: int = 2) -> str:
    """Any JSON value, with keys that look like the ones that matter."""
    kind = draw(st.sampled_from(["scalar"] * 3 + (["list", "object"] if depth else [])))
    if kind == "scalar":
        return draw(_scalar)
    if kind == "list":
        items = draw(st.lists(_json(depth=depth - 1), max_size=3))
        return "[" + ",".join(draw(_space) + item + draw(_space) for item in items) + draw(_space) + "]"
    keys = draw(st.lists(st.sampled_from(["binaries", "name", "currentMd5", "a", "b"]), unique=True, max_size=3))
    members = [(draw(_spell(key)), draw(_json(depth=depth - 1))) for key in keys]
    return _object(draw, members)


def _object(draw: st.DrawFn, members: list[tuple[str, str]]) -> str:
    def gap() -> str:
        return draw(_space)

    inner = ",".join(f"{gap()}{key}{gap()}:{gap()}{value}{gap()}" for key, value in members)
    return "{" + (inner or gap()) + "}"


_HOLE = "\x00"  # stands for the value of a currentMd5; no JSON text holds it


@st.composite
def _manifests(draw: st.DrawFn) -> tuple[str, list[tuple[str, str]]]:
    """The text of a manifest with holes, and for each hole the binary's name and the value that stood there."""
    names = draw(st.lists(st.sampled_from(["a", "b.c", "manager", "x+y"]), unique=True, max_size=4))
    holes: list[tuple[str, str]] = []
    entries = []
    for name in names:
        members = [(draw(_spell("name")), draw(_spell(name)))]
        if draw(st.booleans()):
            members.append((draw(_spell("currentMd5")), _HOLE))
            holes.append((name, draw(st.one_of(_string, st.just("null"), st.just(f'"{MD5}"')))))
        unknown = draw(st.lists(st.sampled_from(["owner", "Name", "currentmd5", "x y"]), unique=True, max_size=2))
        members += [(draw(_spell(key)), draw(_json())) for key in unknown]
        entries.append(_object(draw, draw(st.permutations(members)) if len(members) > 1 else members))
    listed = "[" + ",".join(draw(_space) + item + draw(_space) for item in entries) + draw(_space) + "]"
    members = [(draw(_spell("binaries")), listed)]
    unknown = draw(st.lists(st.sampled_from(["$schema", "Binaries", "comment"]), unique=True, max_size=2))
    members += [(draw(_spell(key)), draw(_json())) for key in unknown]
    text = draw(_space) + _object(draw, draw(st.permutations(members))) + draw(_space)
    return text, holes


@settings(max_examples=300, deadline=None, suppress_health_check=[Check.too_slow, Check.data_too_large])
@given(_manifests(), st.sets(st.sampled_from(["a", "b.c", "manager", "x+y", "gone"])))
def test_every_byte_but_the_md5_stays(drawn: tuple[str, list[tuple[str, str]]], recorded: set[str]) -> None:
    """Unknown keys, key order, white space, escapes, numbers, line ends: only the values that are recorded change."""
    text, holes = drawn
    pieces = text.split(_HOLE)
    # Holes appear in the order of the text; an entry holds at most one, so the names keep that order.
    values = iter([value for _, value in holes])
    before = pieces[0] + "".join(next(values) + piece for piece in pieces[1:])
    names = iter(holes)
    after = pieces[0]
    for piece in pieces[1:]:
        name, value = next(names)
        unchanged = name not in recorded or value == f'"{MD5}"'
        after += (value if unchanged else f'"{MD5}"') + piece
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.json")
        path.write_bytes(before.encode())
        path.chmod(0o600)
        load_manifest(load_settings({}, {"BIN_MANIFESTS": str(path)}))
        record_md5s(str(path), dict.fromkeys(recorded, MD5))
        assert path.read_bytes() == after.encode()
        assert os.listdir(folder) == ["m.json"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n  "])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("indent", [None, 0, 1, 2, 4, "\t"])
def test_the_layout_of_a_manifest_stays(tmp_path: Path, end: str, newline: str, indent: Any) -> None:
    """Indentation, CRLF and a missing last newline are an operator's own."""
    path = tmp_path / "m.json"
    data = {"$note": "ü", "binaries": [{"z": 1, "name": "a", "currentMd5": SHA, "y": [1, 2]}, {"name": "b"}]}
    text = (json.dumps(data, indent=indent, ensure_ascii=False) + end).replace("\r\n", "\n").replace("\n", newline)
    path.write_bytes(text.encode())
    record_md5s(str(path), {"a": MD5, "b": MD5})
    assert path.read_bytes() == text.replace(SHA, MD5).encode()


def test_an_entry_without_currentmd5_does_not_gain_it(tmp_path: Path) -> None:
    """A manifest that configuration management owns is not written at all: not even its inode changes."""
    path = tmp_path / "m.json"
    path.write_text('{"binaries": [{"name": "a"}]}')
    before = (path.stat().st_ino, path.stat().st_ctime_ns)
    record_md5s(str(path), {"a": MD5})
    assert path.read_text() == '{"binaries": [{"name": "a"}]}'
    assert (path.stat().st_ino, path.stat().st_ctime_ns) == before


def test_a_manifest_that_tells_the_truth_is_not_written(tmp_path: Path) -> None:
    """Nothing to record: the file is left as it lies there."""
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"binaries": [{"name": "a", "currentMd5": MD5}]}))
    before = (path.stat().st_ino, path.stat().st_ctime_ns)
    record_md5s(str(path), {"a": MD5})
    assert (path.stat().st_ino, path.stat().st_ctime_ns) == before


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o644])
def test_mode_owner_and_attributes_of_the_manifest_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """What configuration management set is there afterwards."""
    require_root()
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"binaries": [{"name": "a", "currentMd5": ""}]}))
    os.chown(path, 1234, 4321)
    monkeypatch.setenv("SUDO_UID", "1234")
    path.chmod(mode)
    os.setxattr(path, "user.note", b"mine")
    record_md5s(str(path), {"a": MD5})
    found = path.stat()
    assert json.loads(path.read_text())["binaries"][0]["currentMd5"] == MD5
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, mode)
    assert os.getxattr(path, "user.note") == b"mine"


def test_a_linked_manifest_stays_a_link(tmp_path: Path) -> None:
    """The link stays, the file behind it is replaced, and nothing is left in either folder."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "repo").mkdir()
    real, link = tmp_path / "repo" / "m.json", tmp_path / "etc" / "m.json"
    real.write_text(json.dumps({"binaries": [{"name": "a", "currentMd5": ""}]}))
    link.symlink_to("../repo/m.json")
    record_md5s(str(link), {"a": MD5})
    assert os.readlink(link) == "../repo/m.json"
    assert json.loads(real.read_text())["binaries"][0]["currentMd5"] == MD5
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["etc", "m.json", "m.json", "repo"]


def test_an_edit_between_reading_and_recording_stays(tmp_path: Path) -> None:
    """The manifest is read again right before it is replaced: what an operator wrote meanwhile is kept."""
    path = tmp_path / "manifest.json"
    load(tmp_path, entry(currentMd5=""))
    path.write_text(
        '{"new": true, "binaries": [ {"name": "new"}, {"currentMd5": "x", "name":"manager", "version":"2"}]}'
    )
    record_md5s(str(path), {"manager": MD5})
    wanted = '{"new": true, "binaries": [ {"name": "new"}, {"currentMd5": "%s", "name":"manager", "version":"2"}]}'
    assert path.read_text() == wanted % MD5


@pytest.mark.parametrize("text", ["", "{", '{"binaries": 7}', '{"binaries": []', "\xff"])
def test_a_manifest_that_was_broken_meanwhile_is_told_and_left(tmp_path: Path, text: str) -> None:
    """An edit that leaves no valid JSON is not overwritten."""
    path = tmp_path / "m.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(HostError, match="cannot record"):
        record_md5s(str(path), {"a": MD5})
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("items", ['7, "x", null, [], {"name": 7, "currentMd5": ""}', '{"currentMd5": ""}'])
def test_what_is_no_entry_is_passed_over(tmp_path: Path, items: str) -> None:
    """Recording does not trip over entries that an edit has spoilt."""
    path = tmp_path / "m.json"
    path.write_text(f'{{"binaries": [{items}, {{"name": "a", "currentMd5": ""}}]}}')
    record_md5s(str(path), {"a": MD5})
    assert path.read_text() == f'{{"binaries": [{items}, {{"name": "a", "currentMd5": "{MD5}"}}]}}'


def test_readers_never_see_half_a_manifest(tmp_path: Path) -> None:
    """While it is rewritten again and again, every reader gets one whole version."""
    path = tmp_path / "m.json"
    pad = "x" * 200_000
    path.write_text(json.dumps({"binaries": [{"name": "a", "currentMd5": ""}], "pad": pad}))
    stop = threading.Event()

    def rewrite() -> None:
        at = 0
        while not stop.is_set():
            at += 1
            record_md5s(str(path), {"a": f"{at:032x}"})

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        seen = set()
        for _ in range(150):
            found = json.loads(path.read_text())
            assert found["pad"] == pad
            seen.add(found["binaries"][0]["currentMd5"])
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 1


def test_an_operators_edit_during_a_sync_is_kept(host: Host) -> None:
    """End to end: what is written while a download runs is there afterwards, beside the new MD5."""
    host.install("tool", b"tool 1")
    host.write_manifest({"name": "tool", "service": False, "currentMd5": md5(b"tool 1"), "version": "latest"})
    release = host.server.publish("tool", b"tool 2")
    asked, go_on = threading.Event(), threading.Event()

    def wait(handler: Any) -> bool:
        asked.set()
        go_on.wait(20)
        return True

    host.server.always[host.server.download_path("tool")] = wait
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(host.sync(HTTP_TIMEOUT="20")))
    thread.start()
    try:
        eventually(asked.is_set)
        edited = (
            '{"owner": "ops",\n\t"binaries": [ {"name": "tool", "service": false, "currentMd5": "?", "note": 1.50}]}'
        )
        host.manifest_path.write_text(edited)
    finally:
        go_on.set()
        thread.join()
    assert (results[0].returncode, results[0].stderr) == (0, "")
    assert host.manifest_path.read_text() == edited.replace("?", release)


@pytest.mark.parametrize("how", ["content", "mode"])
def test_an_edit_at_the_last_moment_is_kept(host: Host, how: str) -> None:
    """An edit that comes while the new manifest is being written is not overwritten: the recording begins anew."""
    require("strace")
    host.install("tool", b"tool 1")
    release = host.server.publish("tool", b"tool 1")
    host.write_manifest({"name": "tool", "service": False, "currentMd5": "?"})
    there = set(os.listdir(host.root))
    # Each fsync takes 1.5 s: long enough to see the file that is going to replace the manifest.
    slow = ["strace", "-f", "-q", "-o", "/dev/null", "-e", "trace=fsync", "-e", "inject=fsync:delay_enter=1500000"]
    process = subprocess.Popen(
        [*slow, *host.command("sync")], cwd=Path(__file__).parent.parent, env=host.environment(), stderr=subprocess.PIPE
    )
    eventually(lambda: [name for name in set(os.listdir(host.root)) - there if "manifest" in name], 60)
    edited = host.manifest_path.read_text()
    if how == "mode":
        host.manifest_path.chmod(0o600)
    else:
        edited = '{"edited": true, "binaries": [{"name": "tool", "service": false, "currentMd5": "?"}]}'
        new = host.root / "edit"
        new.write_text(edited)
        new.rename(host.manifest_path)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert host.manifest_path.read_text() == edited.replace("?", release)
    assert stat.S_IMODE(host.manifest_path.stat().st_mode) == (0o600 if how == "mode" else 0o644)
