"""Whatever a parser is given, it reads it or raises its own typed error: no other exception, ever."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bin_proxy.errors import BinManagerError, HostError, UsageError
from bin_proxy.server import client as bin_manager
from bin_proxy.store.state import State
from tests.fuzz import MD5, PARSERS, STATE_FILES, fuzz, parse_answer, parse_headers, parse_state
from tests.host import Host

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(MD5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def tried(name: str, raw: bytes) -> None:
    """Give `raw` to a parser; only its own error may come out."""
    parser = PARSERS[name]
    with suppress(*parser.typed):
        parser.call(raw)


def _one_changed(data: Any, drawn: Any, at: list[int]) -> Any:
    """`data` with the value at the position `at[0]`, counted through the whole tree, replaced by `drawn`."""
    at[0] -= 1
    if at[0] == -1:
        return drawn
    if isinstance(data, dict):
        return {key: _one_changed(value, drawn, at) for key, value in data.items()}
    if isinstance(data, list):
        return [_one_changed(value, drawn, at) for value in data]
    return data


@pytest.mark.parametrize("name", PARSERS)
def test_the_inputs_to_start_from_reach_every_parser(name: str) -> None:
    """Every seed of the fuzz run is read or refused, and most parsers accept one: they are not all thrown out early."""
    for seed in PARSERS[name].seeds:
        tried(name, seed)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=80, deadline=None)
@given(raw=st.binary(max_size=200))
@example(raw=b"")
@example(raw=b"\xef\xbb\xbf{}")
@example(raw=b"9" * 5000)
@example(raw=b"[" * 100_000)
@example(raw=b'{"a":' * 100_000)
def test_any_bytes(name: str, raw: bytes) -> None:
    """Noise."""
    tried(name, raw)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=120))
def test_any_text(name: str, text: str) -> None:
    """Any text at all, of any script, with control characters, but no surrogates."""
    tried(name, text.encode())


@pytest.mark.parametrize("name", ["manifest", "answer", "state"])
@relaxed
@given(data=_json)
def test_any_json(name: str, data: Any) -> None:
    """Valid JSON (and NaN, as many a program writes it) of any shape."""
    tried(name, json.dumps(data).encode())


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_almost_right(name: str) -> None:
    """A second of the fuzz run, with a fixed seed for each parser; `python -m tests.fuzz` does it for longer."""
    count, _, findings = fuzz(name, 1.0, random.Random(name))
    assert count > 10
    assert not findings, findings[0][1] + repr(findings[0][0])


@pytest.mark.parametrize("file", STATE_FILES)
@relaxed
@given(at=st.integers(0, 40), drawn=_json)
def test_a_state_file_in_which_one_value_is_another(file: str, at: int, drawn: Any) -> None:
    """One value of a real state file, at any depth, replaced by any JSON: set aside, or read as what it is."""
    parse_state(json.dumps(_one_changed(json.loads(STATE_FILES[file]), drawn, [at])).encode())


def _with_a_word(value: Any) -> Iterator[Any]:
    """The value as often as there are lists and objects in it, each time with a word in the place of one of them."""
    if isinstance(value, (list, dict)):
        yield "word"
        for key in value if isinstance(value, dict) else range(len(value)):
            for changed in _with_a_word(value[key]):
                copy = value.copy()
                copy[key] = changed
                yield copy


@pytest.mark.parametrize("file", STATE_FILES)
def test_a_state_file_of_another_shape_is_unreadable(file: str, tmp_path: Path) -> None:
    """A word in the place of a list would be worked through letter by letter; what must be there is not nothing."""
    whole = json.loads(STATE_FILES[file])
    may_lack = {"cache.json": set(whole) - {"version"}, "journal/manager.json": {"phase", "fault", "reason"}}
    may_lack["state.json"] = {"blind"}
    needed = set(whole) - may_lack.get(file, set())
    less = [{key: value for key, value in whole.items() if key != left_out} for left_out in needed]
    for content in [*_with_a_word(whole), *less]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
        assert [name for name, _ in State(str(tmp_path), ("manager",)).unreadable] == [file], content


def test_a_memory_of_the_version_before_is_read(tmp_path: Path) -> None:
    """Of what an upgrade adds the default counts, and what it gave up is passed over: no hold is lost."""
    whole = json.loads(STATE_FILES["state.json"])
    memory = whole["memories"]["manager"]
    del memory["due"]
    memory |= {"seen": {MD5: 1.0}, "lost": ""}
    (tmp_path / "state.json").write_text(json.dumps(whole))
    state = State(str(tmp_path), ("manager",))
    assert state.unreadable == [] and state.memory("manager").hold_on("1" * 32)
    assert state.memory("manager").due == {}


@pytest.mark.parametrize(
    "wrong", [{"last_sync": [1.0]}, {"troubles": {"a host x": ["a", "t"]}}, {"answers": {"a": ["latest", "x"]}}]
)
def test_a_cache_with_too_few_values_is_unreadable(wrong: dict[str, Any], tmp_path: Path) -> None:
    """Whoever unpacks them would stumble."""
    (tmp_path / "cache.json").write_text(json.dumps(json.loads(STATE_FILES["cache.json"]) | wrong))
    assert [name for name, _ in State(str(tmp_path), ()).unreadable] == ["cache.json"]


@pytest.mark.parametrize("date", [-1.0, 1e12, 1e300, "1e999"])
def test_a_state_file_with_a_date_beyond_the_calendar_is_unreadable(date: float | str, tmp_path: Path) -> None:
    """No calendar can show it, so whoever tells it would stumble."""
    text = json.dumps({"version": 1, "pauses": {"*": {"reason": "", "since": 0.0, "until": None}}})
    (tmp_path / "pauses.json").write_text(text.replace("0.0", str(date)))
    assert [name for name, _ in State(str(tmp_path), ()).unreadable] == ["pauses.json"]


@relaxed
@given(at=st.integers(0, 12), drawn=_json)
def test_an_answer_in_which_one_value_is_another(at: int, drawn: Any) -> None:
    """One value of a real answer replaced by any JSON: a release, or the error that says what came instead."""
    data = {
        "code": 0,
        "message": "success",
        "data": {"md5": MD5, "sha256": MD5 + MD5, "size": 7, "more": [1, {"a": 2}]},
    }
    parse_answer(json.dumps(_one_changed(data, drawn, [at])).encode())


ENTRY = {
    "binaries": [
        {"name": "a", "version": "1", "path": "/x/a", "service": ["s", "g:*"], "currentMd5": ""}
        | {
            "healthCheck": {"http": "http://h:80/"},
            "minHealthySeconds": 1,
            "healthTimeout": 2.5,
            "more": {"deep": [1]},
        },
        {"name": "b", "healthCheck": {"command": ["/x", "y"]}, "verifyCommand": ["{file}"], "service": False},
    ]
}


@relaxed
@given(at=st.integers(0, 30), drawn=_json)
def test_a_manifest_in_which_one_value_is_another(at: int, drawn: Any) -> None:
    """One value of a real manifest replaced by any JSON: taken or refused."""
    tried("manifest", json.dumps(_one_changed(ENTRY, drawn, [at])).encode())


_header = st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\n"), max_size=40)
_date = st.from_regex(
    r"([A-Z][a-z]{2}, )?[0-9]{1,4} (Jan|Feb|Xxx) [0-9]{1,6} [0-9]{1,3}:[0-9]{2}(:[0-9]{2})?( (GMT|[+-][0-9]{1,6}))?",
    fullmatch=True,
)


@settings(max_examples=300, deadline=None)
@given(_header | _date | st.integers().map(str))
@example("")
@example("-1")
@example("9" * 400)
@example("\u00b2")
def test_any_header(value: str) -> None:
    """Retry-After of any form."""
    parse_headers(value.encode("latin-1"))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("0", 0.0), ("7", 7.0), (" 7 ", 7.0), ("", 0.0), ("soon", 0.0), ("-5", 0.0), ("1.5", 0.0), ("9" * 50, None)),
        *(("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 21 Oct 99999 07:28:00 GMT", None)),
    ],
)
def test_what_retry_after_means(value: str, seconds: float | None) -> None:
    """Seconds or a date; what is neither, or has passed, asks for no pause."""
    response = bin_manager.requests.Response()
    response.headers["Retry-After"] = value
    found = bin_manager._retry_after(response)
    assert found >= 0 and (seconds is None or found == seconds)


@pytest.mark.parametrize(
    "body",
    [
        *(
            {"code": 0, "data": {"md5": value}}
            for value in (None, 7, "", MD5[1:], MD5 + "0", "g" * 32, [MD5], "\u0661" * 32)
        ),
        *({"code": value, "data": {"md5": MD5}} for value in (None, 1, "0", 0.0, False, True, [], 201)),
        *({"code": 0, "data": {"md5": MD5, "size": value}} for value in (-1, 1.5, "x", True, [])),
        *({"code": 0, "data": {"md5": MD5, "sha256": value}} for value in ("", MD5, 7, "x" * 64, [])),
        *({"code": 0, "data": value} for value in (None, [], MD5, 7)),
        *({"data": {"md5": MD5}}, [], None, 7, "text", {}),
    ],
    ids=repr,
)
def test_what_is_no_release_is_never_taken_for_one(body: Any) -> None:
    """An answer that is not exactly a release fails with the HTTP status."""
    with pytest.raises(BinManagerError, match="HTTP 200"):
        bin_manager._parse_release(json.dumps(body).encode())


def test_what_is_a_release_is_taken(tmp_path: Path) -> None:
    """Code 0 or 200, MD5 in any case with white space around it."""
    for code in (0, 200):
        body = {"code": code, "data": {"md5": f" \n{MD5.upper()}\t", "sha256": " " + "AB" * 32, "size": 0}}
        found = bin_manager._parse_release(json.dumps(body).encode())
        assert (found.md5, found.sha256, found.size) == (MD5, "ab" * 32, 0)


def test_what_it_writes_itself_is_read_again(tmp_path: Path) -> None:
    """The state files that the other tests spoil are read whole, so those tests spoil what matters."""
    for file, raw in STATE_FILES.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(raw)
    state = State(str(tmp_path), ("manager",))
    assert state.unreadable == []
    assert state.memory("manager").holds[0].md5 == "1" * 32
    assert state.cache.outcomes == {"manager": "current"}
    assert state.pauses["*"].reason == "maintenance"
    record = state.records["manager"]
    assert record and record.new == MD5


@pytest.mark.parametrize("name", ["state.json", "cache.json", "pauses.json", "journal", "journal/tool.json"])
@pytest.mark.parametrize("instead", ["a folder", "a file of noise", "an empty file", "a broken link"])
def test_a_spoilt_state_folder_is_one_line_or_none(host: Host, name: str, instead: str) -> None:
    """Whatever lies in STATE_DIR in the place of a file, a sync ends with 0 or 1, a line that says so, no traceback."""
    host.install("tool", b"tool 1")
    host.write_manifest({"name": "tool", "service": False})
    host.server.publish("tool", b"tool 1")
    path = host.state / name
    path.parent.mkdir(parents=True)
    if instead == "a folder":
        path.mkdir()
        (path / "x").mkdir()
    elif instead == "a broken link":
        path.symlink_to("/proc/nowhere")
    else:
        path.write_bytes(b"\xff{" if instead == "a file of noise" else b"")
    done = host.sync()
    assert done.returncode in (0, 1)
    assert len(done.stderr.splitlines()) <= 2  # what was kept aside, and what became of the binary
    assert done.returncode == 0 or str(host.state) in done.stderr
    assert (host.bin / "tool").read_bytes() == b"tool 1"


@pytest.mark.parametrize("drawn", ["1e999", "-1", "1" + "0" * 30, '"\\ud800"', "-1e300"])
def test_absurd_numbers_in_the_state_are_no_traceback(host: Host, drawn: str) -> None:
    """Every number of real state files replaced by an absurd one: sync and its dry run end with 0 or 1."""
    host.install("manager", b"tool 1")
    host.write_manifest({"name": "manager", "service": False})
    host.server.publish("manager", b"tool 2")
    (host.state / "journal").mkdir(parents=True)

    def absurd(data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value if key == "version" else absurd(value) for key, value in data.items()}
        if isinstance(data, list):
            return [absurd(value) for value in data]
        return "@" if type(data) is float else data

    for file in ("state.json", "cache.json"):
        (host.state / file).write_text(json.dumps(absurd(json.loads(STATE_FILES[file]))).replace('"@"', drawn))
    for arguments in (("sync", "--dry-run"), ("sync",), ("sync", "--retry-held")):
        assert host.run(*arguments).returncode in (0, 1)


def test_the_fuzz_run_prints_its_figures() -> None:
    """`python -m tests.fuzz` tells how many inputs each parser was given, and exits 0 where nothing was found."""
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "0.7", "--seed", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 1\n")
    assert all(name in done.stdout for name in PARSERS)


def test_the_typed_errors_are_the_documented_ones() -> None:
    """A parser that is allowed to raise anything would make these tests worthless."""
    allowed = {error for parser in PARSERS.values() for error in parser.typed}
    assert allowed == {UsageError, HostError}
