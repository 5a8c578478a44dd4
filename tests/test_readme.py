"""The READMEs name what there is: settings with their defaults, commands and options, files, metrics; alike in both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from bin_proxy.cli import cli
from bin_proxy.config.manifest import load_manifest
from bin_proxy.config.settings import TABLE, load_settings
from bin_proxy.output.report import write_metrics
from bin_proxy.policy.model import Cache, LastSync

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
both = pytest.mark.parametrize("readme", (ENGLISH, CHINESE), ids=("english", "chinese"))


def blocks(readme: Path) -> list[tuple[str, str]]:
    """Language and text of every block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", readme.read_text(), re.M | re.S)


def prose(readme: Path) -> str:
    """What is not in a block of code."""
    return re.sub(r"^```\w+\n.*?^```$", "", readme.read_text(), flags=re.M | re.S)


def rows(readme: Path) -> list[list[str]]:
    """The cells of every row of every table."""
    lines = [line for line in prose(readme).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def parameters() -> Iterator[tuple[str, click.Parameter]]:
    """Every parameter of every command, with the command's name (empty for what stands before it)."""
    context = click.Context(cli)
    yield from (("", parameter) for parameter in cli.get_params(context))
    for name, command in cli.commands.items():
        yield from ((name, parameter) for parameter in command.params)


@both
def test_every_setting_stands_there_with_its_default(readme: Path) -> None:
    """The settings table holds the settings that there are, each with the default that it has."""
    told = {row[0].strip("`"): row[1].strip("`-") for row in rows(readme) if row[0].strip("`") in TABLE}
    defaults = {name: default for name, (_, default, _) in TABLE.items()}
    assert told == defaults | {"SUPERVISORCTL": "supervisorctl"}  # which alone may be absent, so it is none inside


@both
def test_every_command_and_option_is_told(readme: Path) -> None:
    """Each command has a row, which tells its options; what stands before a command is told, too."""
    text = prose(readme)
    lines = {
        name: " ".join(next(r for r in rows(readme) if r[0].startswith(f"`bin-proxy {name}"))) for name in cli.commands
    }
    for command, parameter in parameters():
        if isinstance(parameter, click.Option):
            for flag in parameter.opts:
                assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", lines.get(command, text)), (command, flag)


@both
def test_every_option_that_it_tells_exists(readme: Path) -> None:
    """What looks like an option of bin-proxy in the table of commands is one."""
    for row in rows(readme):
        if match := re.match(r"`bin-proxy (\w+)", row[0]):
            known = {flag for command, parameter in parameters() if command == match[1] for flag in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", " ".join(row))) <= known


@both
def test_the_manifest_that_it_shows_is_a_manifest(readme: Path, tmp_path: Path) -> None:
    """The example is accepted as it stands, and the table of keys names every key that it uses."""
    [text] = [text for language, text in blocks(readme) if language == "json"]
    (tmp_path / "manifest.json").write_text(text)
    settings = load_settings({"BIN_MANIFESTS": str(tmp_path / "manifest.json")}, {})
    assert [binary.name for binary in load_manifest(settings)] == ["manager", "agent", "report-tool"]
    keys = [row[0] for row in rows(readme) if re.fullmatch(r"(`\w+`[,、 ]*)+", row[0])]
    told = {key for cell in keys for key in re.findall(r"`(\w+)`", cell)}
    used = {key for entry in json.loads(text)["binaries"] for key in entry}
    assert used - {"currentMd5"} <= told


@both
def test_every_metric_is_told(readme: Path, tmp_path: Path) -> None:
    """The table of metrics, and the rules for alerts, speak of the metrics that are written, and of no others."""
    write_metrics(str(tmp_path / "m.prom"), Cache(last_sync=LastSync(0.0, 0)), {"manager": {"held"}})
    written = set(re.findall(r"^(bin_proxy_\w+)", (tmp_path / "m.prom").read_text(), re.M))
    assert set(re.findall(r"`(bin_proxy_[a-z_]+)`", prose(readme))) == written
    [rules] = [text for language, text in blocks(readme) if language == "yaml"]
    assert set(re.findall(r"bin_proxy_[a-z_]+", rules)) <= written


@both
def test_every_module_is_in_the_map(readme: Path) -> None:
    """The table of rooms names the modules and folders that there are."""
    found = (ROOT / "bin_proxy").iterdir()
    there = {f"{path.name}/" if path.is_dir() else path.name for path in found if not path.name.startswith("__")}
    named = {room for row in rows(readme) for room in re.findall(r"`(\w+\.py|\w+/)`", row[0])}
    assert named == there - {"py.typed"}


@both
def test_every_file_that_it_names_is_there(readme: Path) -> None:
    """Examples and packaging that it refers to exist."""
    named = set(re.findall(r"(?<![/\w])(?:\./)?((?:examples|packaging)/[\w.-]*\w)", readme.read_text()))
    assert named and not [file for file in named if not (ROOT / file).exists()]


@both
def test_the_marked_commands_are_there(readme: Path) -> None:
    """The two commands of a newcomer stand behind their markers, as one line each."""
    for marker in ("quickstart", "test"):
        assert re.search(rf"^<!-- {marker}-command -->\n```sh\n[^\n]+\n```$", readme.read_text(), re.M)


def test_both_have_one_structure() -> None:
    """Both have the same headings, tables, lists and places to fill, in the same order."""

    def shape(readme: Path) -> list[str]:
        pattern = r"^(?:(#+) |(<!-- [\w-]+ -->)|(\|)|(-|\d+\.) |(?:\*\*|`)\w)"
        return [next(filter(None, match), "") for match in re.findall(pattern, prose(readme), re.M) if any(match)]

    assert shape(ENGLISH) == shape(CHINESE)
    assert [len(row) for row in rows(ENGLISH)] == [len(row) for row in rows(CHINESE)]


def test_both_show_the_same_code() -> None:
    """The blocks of code are the same, but for comments."""

    def code(readme: Path) -> list[tuple[str, str]]:
        return [(kind, text if kind == "console" else re.sub(r" *# .*", "", text)) for kind, text in blocks(readme)]

    assert code(ENGLISH) == code(CHINESE)


@both
def test_links_lead_somewhere(readme: Path) -> None:
    """Every link within the repository leads to a file."""
    for target in re.findall(r"\]\(([^)#:]+)\)", readme.read_text()):
        assert (ROOT / target).exists(), target
