"""What people and machines are told: LOG_FILE, the terminal or cron's mail, and what was told before."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import textwrap
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from bin_proxy.atomic import write_atomically
from bin_proxy.errors import clean, host_error
from bin_proxy.plan import Result
from bin_proxy.state import Cache

if TYPE_CHECKING:
    from bin_proxy.staging import Part

_HOUR = 3600.0
_LOG_KEY = "* LOG_FILE"


class Report:
    """Tells what happens, each to whom it concerns.

    Args:
        log_file: appended to; opened at the first line.
        terminal: a person watches: tell what is done.
        verbose: 1 tells requests and calls too, -1 only trouble.
    """

    def __init__(self, log_file: str, *, terminal: bool, verbose: int) -> None:
        self._path, self._terminal, self._verbose = log_file, terminal, verbose
        self._fd: int | None = None
        self._bar: Any = None
        self._seen: dict[str, Part] = {}
        self.log_trouble = ""

    def log(self, line: str) -> None:
        """Append a line to LOG_FILE; where that fails, it is remembered as `log_trouble` and the work goes on."""
        try:
            if self._fd is None:
                self._fd = _open_log(self._path)
            stamp = time.strftime("[%Y-%m-%d %H:%M:%S]")
            os.write(self._fd, f"{stamp} {clean(line)}\n".encode(errors="backslashreplace"))
        except OSError as error:
            self.log_trouble = f"cannot write LOG_FILE {self._path}: {error.strerror}"

    def tell(self, line: str) -> None:
        """Say what is going on to a person who watches."""
        if (self._terminal and self._verbose >= 0) or self._verbose > 0:
            self._erase_bar()
            _echo(line)

    def progress(self, parts: list[Part]) -> None:
        """Show how far the downloads under way are; none takes the bar away."""
        if not self._terminal or self._verbose < 0:
            return
        if not parts:
            self._erase_bar()
            self._bar, self._seen = None, {}
            return
        self._seen |= {part.path: part for part in parts}
        done = sum(part.offset for part in self._seen.values())
        total = max(1, done, sum(part.total or 0 for part in self._seen.values()))
        if self._bar is None:
            self._bar = click.progressbar(length=total, label="downloading", width=0, show_pos=False)
        self._bar.length = total
        self._bar.update(done - self._bar.pos)

    def _erase_bar(self) -> None:
        if self._bar:
            click.echo("\r\x1b[K\x1b[?25h", nl=False)  # erases the line, and shows the cursor that the bar hides

    def detail(self, line: str) -> None:
        """Say a detail to a person who asked for details."""
        if self._verbose > 0:
            _echo(line, err=True)

    def troubles(self, results: list[Result], others: list[str], cache: Cache, now: float) -> None:
        """Tell each trouble once, log it hourly, and log its end; one cause that strikes many is one line.

        Args:
            results: of the binaries this run looked at.
            others: troubles that belong to no binary.
            cache: holds what was told before; updated.
            now: Unix time.
        """
        told: dict[str, list[str]] = {}
        logged: dict[str, list[str]] = {}
        before = dict(cache.troubles)
        watched = self._terminal or self._verbose > 0

        def note(key: str, name: str, text: str, *, log: bool = True) -> None:
            since, at, _ = cache.troubles.get(key, [now, 0.0, ""])
            if key not in before or watched:
                told.setdefault(text, []).append(name)
            if key not in before or abs(now - float(at)) >= _HOUR:
                at = now
                if log:
                    logged.setdefault(text, []).append(name)
            current.add(key)
            cache.troubles[key] = [since, at, text]

        current: set[str] = set()
        for result in results:
            if not result.well:
                fresh_line = result.outcome != "rolled-back"  # that was logged when it happened
                note(
                    f"{result.name} {result.kind} {result.to_md5 or ''}",
                    result.name,
                    result.error or "",
                    log=fresh_line,
                )
        for text in others:
            note(f"* {text.split(':')[0]}", "", text)
        looked_at = {result.name for result in results} | {"*"}
        troubled = {key.split(" ")[0] for key in current}
        for key in [key for key in before if key.split(" ")[0] in looked_at and key not in current]:
            if key == _LOG_KEY and self._fd is None:
                continue  # nothing was logged, so nobody knows whether it is over
            since, _, was = cache.troubles.pop(key)
            name = key.split(" ")[0]
            if name not in troubled:
                minutes = max(0.0, now - float(since)) / 60
                self.log(f"{name.replace('*', 'bin-proxy')}: over after {minutes:.0f} min: {was}")
        for text, names in logged.items():
            self.log(_line(names, text))
        if self.log_trouble:
            note(_LOG_KEY, "", self.log_trouble, log=False)
        for text, names in told.items():
            _echo(f"bin-proxy: {_line(names, text)}", err=True)


def _line(names: list[str], text: str) -> str:
    if not names[0]:
        return text
    more = f" and {len(names) - 5} more" if len(names) > 6 else ""
    return f"{', '.join(names[:5] if more else names)}{more}: {text}"


def _echo(line: str, err: bool = False) -> None:
    line = clean(line)
    if (sys.stderr if err else sys.stdout).isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    with suppress(OSError):  # nobody listens any more, which is no reason to stop half-way
        click.echo(line, err=err)


def _open_log(path: str) -> int:
    """Open for appending: an existing file by whatever link leads there, a new one never through a link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "it is a pipe")
    return fd


def write_metrics(path: str, cache: Cache, names: list[str], paused: set[str]) -> None:
    """Write METRICS_FILE for node_exporter's textfile collector, which reads it at any time.

    Args:
        path: the file; it gets mode 0644.
        cache: knows the last sync, and each binary's last outcome.
        names: of all binaries.
        paused: those that an operator paused.

    Raises:
        HostError: it is as it was.
    """
    at, code = cache.last_sync
    lines: list[str] = []

    def add(name: str, text: str, values: dict[str, float]) -> None:
        lines.extend((f"# HELP bin_proxy_{name} {text}", f"# TYPE bin_proxy_{name} gauge"))
        lines.extend(f"bin_proxy_{name}{label} {value:.17g}" for label, value in values.items())

    def each(*outcomes: str) -> dict[str, float]:
        return {f'{{binary="{name}"}}': float(cache.outcomes.get(name) in outcomes) for name in names}

    add("last_sync_timestamp_seconds", "When the last sync ended.", {"": at})
    add("last_sync_exit_code", "Exit code of the last sync: 0 or 1.", {"": code})
    add("binary_current", "1 where the binary is the release that bin-manager names.", each("current", "updated"))
    add("binary_held", "1 where the release is held because it failed.", each("held", "rolled-back"))
    add("binary_held_by_operator", "1 where an operator went back from the release.", each("held by operator"))
    add("binary_failed", "1 where the last sync could not do its work.", each("failed"))
    add("binary_paused", "1 where an operator paused it.", {f'{{binary="{n}"}}': float(n in paused) for n in names})
    try:
        write_atomically(path, "\n".join([*lines, ""]).encode(), durable=False)
    except OSError as error:
        raise host_error(f"write METRICS_FILE {path}", error) from error
