"""What people and machines are told: LOG_FILE, the terminal or cron's mail, and what was told before."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import click

from bin_proxy.errors import HostError, clean, host_errors
from bin_proxy.host.files import write_atomically
from bin_proxy.policy.model import Cache, Trouble
from bin_proxy.policy.plan import Result

_HOUR = 3600.0
# Of a binary, with its words.
_GAUGES = {
    "current": "1 where the binary is the release that bin-manager names.",
    "held": "1 where the release is held because it failed.",
    "held_by_operator": "1 where an operator went back from the release.",
    "failed": "1 where the last sync could not do its work.",
    "paused": "1 where an operator paused it.",
}


class Finding(NamedTuple):
    """Something to be told: whether it is as it should be, the binary that it is of ("": the host), and the words."""

    well: bool
    name: str
    text: str


def merge(findings: Iterable[Finding]) -> Iterator[tuple[bool, str]]:
    """What strikes many is one line: whether that is as it should be, and the line, with the names."""
    struck: dict[tuple[bool, str], list[str]] = {}
    for well, name, text in findings:
        struck.setdefault((well, text), []).append(name)
    for (well, text), names in struck.items():
        who = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        yield well, f"{who}: {text}" if who else text


def when(at: float) -> str:
    """Unix time as people here read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def echo(line: str, *, err: bool = False) -> None:
    """Print one line, with whatever no terminal should obey escaped; not wrapped, so that a command can be copied."""
    with suppress(OSError):  # nobody listens any more, which is no reason to stop half-way
        click.echo(clean(line), err=err)


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
        self.notes: list[str] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A HostError within it belongs to no binary and stops nothing: it is one of the `notes`."""
        try:
            yield
        except HostError as error:
            self.notes.append(str(error))

    def log(self, line: str) -> None:
        """Append a line to LOG_FILE; where that fails, it is said, and the work goes on without a log."""
        try:
            self._fd = self._fd or _open_log(self._path)
            _append(self._fd, f"[{when(time.time())}] {clean(line)}\n".encode(errors="backslashreplace"))
        except OSError as error:
            self._erase_bar()
            echo(f"bin-proxy: cannot write LOG_FILE {self._path}: {error.strerror}", err=True)
            self._fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def tell(self, line: str) -> None:
        """Say what is going on to a person who watches."""
        if self._verbose > 0 or (self._terminal and self._verbose == 0):
            self._erase_bar()
            echo(line, err=self._verbose > 0)  # what --json prints stays alone

    def detail(self, line: str) -> None:
        """Say a detail to a person who asked for details."""
        if self._verbose > 0:
            echo(line, err=True)

    def progress(self, done: int, total: int) -> None:
        """Show how many of the bytes of this run's downloads are there; 0 of 0 takes the bar away."""
        if not done and not total:
            self._erase_bar()
            self._bar = None
        elif self._terminal and self._verbose >= 0:
            self._bar = self._bar or click.progressbar(length=1, label="downloading", width=0, show_pos=False)
            self._bar.length = max(done, total)
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
        current = {key: Finding(False, result.name, result.error or "") for key, result in bad.items()}
        current |= {f" {text.split(':')[0]}": Finding(False, "", text) for text in self.notes}
        logged = {key for key, result in bad.items() if result.outcome == "rolled-back"}  # when it happened
        # Of a binary that is paused, or for which bin-manager did not answer, nobody knows whether a trouble is over.
        judged = {"", *(result.name for result in results if result.to_md5)}
        for key, told in list(cache.troubles.items()):
            if key not in current and told.name in judged:
                del cache.troubles[key]
                minutes = max(0.0, now - told.since) / 60
                self.log(f"{told.name or 'bin-proxy'}: over after {minutes:.0f} min: {told.text}")
        new = {key for key in current if key not in cache.troubles}
        due = {key for key in current if key in new or abs(now - cache.troubles[key].logged) >= _HOUR}
        for _, line in merge(current[key] for key in current if key in due - logged):
            self.log(line)
        watched = self._terminal or self._verbose > 0
        for _, line in merge(current[key] for key in current if watched or key in new):
            echo(f"bin-proxy: {line}", err=True)
        for key, (_, name, text) in current.items():
            known = cache.troubles.get(key, Trouble(name, text, now, now))
            cache.troubles[key] = known._replace(text=text, logged=now if key in due else known.logged)


def _open_log(path: str) -> int:
    """Open for appending: an existing file by whatever link leads there, a new one never through a link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe that nobody reads is not waited for
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)


def _append(fd: int, data: bytes) -> None:
    """All of `data` or, where the disk gets full in it, nothing: one event is one line."""
    before = os.fstat(fd)
    if os.write(fd, data) < len(data):
        if stat.S_ISREG(before.st_mode):
            os.ftruncate(fd, before.st_size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_metrics(path: str, cache: Cache, binaries: Mapping[str, Collection[str]]) -> None:
    """Write METRICS_FILE for node_exporter's textfile collector, which reads it at any time.

    Args:
        path: the file; it gets mode 0644.
        cache: knows the last sync.
        binaries: by name, which of current, held, held_by_operator, failed and paused are 1.

    Raises:
        HostError: it is as it was.
    """
    at, code = cache.last_sync or (0.0, 0)
    text = _gauge("last_sync_timestamp_seconds", "When the last sync ended.", {"": at})
    text += _gauge("last_sync_exit_code", "Exit code of the last sync: 0 or 1.", {"": code})
    for metric, told in _GAUGES.items():
        text += _gauge(f"binary_{metric}", told, {f'{{binary="{n}"}}': metric in ones for n, ones in binaries.items()})
    with host_errors(f"write METRICS_FILE {path}"):
        write_atomically(path, text.encode(), durable=False)


def _gauge(metric: str, told: str, values: Mapping[str, float]) -> str:
    samples = "".join(f"bin_proxy_{metric}{label} {value:.17g}\n" for label, value in values.items())
    return f"# HELP bin_proxy_{metric} {told}\n# TYPE bin_proxy_{metric} gauge\n{samples}"
