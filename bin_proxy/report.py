"""What people and machines are told: LOG_FILE, the terminal or cron's mail, and what was told before."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from bin_proxy.atomic import write_atomically
from bin_proxy.errors import HostError, clean, host_errors
from bin_proxy.memory import Cache, Trouble
from bin_proxy.plan import Result

if TYPE_CHECKING:
    from bin_proxy.staging import Part

_HOUR = 3600.0
_LOG_KEY = " LOG_FILE"


def echo(line: str, *, err: bool = False) -> None:
    """Print one line, wrapped on a terminal, with whatever no terminal should obey escaped."""
    line = clean(line)
    if (sys.stderr if err else sys.stdout).isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    with suppress(OSError):  # nobody listens any more, which is no reason to stop half-way
        click.echo(line, err=err)


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
        self.notes: list[str] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A HostError within it belongs to no binary and stops nothing: it is one of the `notes`."""
        try:
            yield
        except HostError as error:
            self.notes.append(str(error))

    def log(self, line: str) -> None:
        """Append a line to LOG_FILE; where that fails, `log_trouble` says why and the work goes on."""
        try:
            if self._fd is None:
                self._fd = _open_log(self._path)
            stamp = time.strftime("[%Y-%m-%d %H:%M:%S]")
            os.write(self._fd, f"{stamp} {clean(line)}\n".encode(errors="backslashreplace"))
        except OSError as error:
            self.log_trouble = f"cannot write LOG_FILE {self._path}: {error.strerror}"

    def tell(self, line: str) -> None:
        """Say what is going on to a person who watches."""
        if self._verbose > 0 or (self._terminal and self._verbose == 0):
            self._erase_bar()
            echo(line)

    def detail(self, line: str) -> None:
        """Say a detail to a person who asked for details."""
        if self._verbose > 0:
            echo(line, err=True)

    def progress(self, parts: list[Part]) -> None:
        """Show how far the downloads under way are; none takes the bar away."""
        if not parts:
            self._erase_bar()
            self._bar, self._seen = None, {}
        elif self._terminal and self._verbose >= 0:
            self._seen |= {part.path: part for part in parts}
            done = sum(part.offset for part in self._seen.values())
            total = max(1, done, sum(part.total or 0 for part in self._seen.values()))
            self._bar = self._bar or click.progressbar(length=total, label="downloading", width=0, show_pos=False)
            self._bar.length = total
            self._bar.update(done - self._bar.pos)

    def _erase_bar(self) -> None:
        if self._bar:
            click.echo("\r\x1b[K\x1b[?25h", nl=False)  # erases the line, and shows the cursor that the bar hides

    def troubles(self, results: list[Result], cache: Cache, now: float) -> None:
        """Tell each trouble, and note, once, log it hourly, and log its end; one cause that strikes many is one line.

        Args:
            results: of the binaries this run looked at.
            cache: holds what was told before; updated.
            now: Unix time.
        """
        bad = {f"{result.name} {result.kind} {result.to_md5 or ''}": result for result in results if not result.well}
        current = {key: (result.name, result.error or "") for key, result in bad.items()}
        current |= {f" {text.split(':')[0]}": ("", text) for text in self.notes}
        # Of a binary that is paused, or for which bin-manager did not answer, nobody knows whether a trouble is over.
        judged = {"", *(result.name for result in results if result.to_md5)}
        self._log_ends(current, judged, cache, now)
        known = dict(cache.troubles)
        due = {key for key in current if key not in known or abs(now - known[key].logged) >= _HOUR}
        due -= {key for key, result in bad.items() if result.outcome == "rolled-back"}  # logged when it happened
        for line in _lines(current[key] for key in current if key in due):
            self.log(line)
        if self.log_trouble:
            current[_LOG_KEY] = ("", self.log_trouble)
        watched = self._terminal or self._verbose > 0
        for line in _lines(current[key] for key in current if watched or key not in known):
            echo(f"bin-proxy: {line}", err=True)
        for key, (name, text) in current.items():
            told = known.get(key, Trouble(name, text, now, now))
            cache.troubles[key] = told._replace(text=text, logged=now if key in due else told.logged)

    def _log_ends(self, current: Collection[str], judged: set[str], cache: Cache, now: float) -> None:
        for key, told in list(cache.troubles.items()):
            if key in current or told.name not in judged:
                continue
            if key == _LOG_KEY and (self._fd is None or self.log_trouble):
                continue  # where nothing was logged, nobody knows whether it is over
            del cache.troubles[key]
            minutes = max(0.0, now - told.since) / 60
            self.log(f"{told.name or 'bin-proxy'}: over after {minutes:.0f} min: {told.text}")


def _lines(troubles: Iterable[tuple[str, str]]) -> Iterator[str]:
    """One line for each text, with the names of those it strikes."""
    struck: dict[str, list[str]] = {}
    for name, text in troubles:
        struck.setdefault(text, []).extend([name] if name else [])
    for text, names in struck.items():
        more = f" and {len(names) - 5} more" if len(names) > 6 else ""
        who = ", ".join(names[:5] if more else names) + more
        yield f"{who}: {text}" if who else text


def _open_log(path: str) -> int:
    """Open for appending: an existing file by whatever link leads there, a new one never through a link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe that nobody reads is not waited for
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)


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

    def each(*outcomes: str) -> dict[str, float]:
        return {f'{{binary="{name}"}}': float(cache.outcomes.get(name) in outcomes) for name in names}

    at, code = cache.last_sync or (0.0, 0)
    gauges: list[tuple[str, str, dict[str, float]]] = [
        ("last_sync_timestamp_seconds", "When the last sync ended.", {"": at}),
        ("last_sync_exit_code", "Exit code of the last sync: 0 or 1.", {"": code}),
        ("binary_current", "1 where the binary is the release that bin-manager names.", each("current", "updated")),
        ("binary_held", "1 where the release is held because it failed.", each("held", "rolled-back")),
        ("binary_held_by_operator", "1 where an operator went back from the release.", each("held by operator")),
        ("binary_failed", "1 where the last sync could not do its work.", each("failed")),
        ("binary_paused", "1 where an operator paused it.", {f'{{binary="{n}"}}': float(n in paused) for n in names}),
    ]
    text = ""
    for gauge, told, values in gauges:
        text += f"# HELP bin_proxy_{gauge} {told}\n# TYPE bin_proxy_{gauge} gauge\n"
        text += "".join(f"bin_proxy_{gauge}{label} {value:.17g}\n" for label, value in values.items())
    with host_errors(f"write METRICS_FILE {path}"):
        write_atomically(path, text.encode(), durable=False)
