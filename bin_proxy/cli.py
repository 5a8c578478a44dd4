"""The commands: options in, words, tables, JSON and exit codes out."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import click
from click import Context

from bin_proxy import __version__
from bin_proxy.config.manifest import load_manifest
from bin_proxy.config.settings import TABLE, Settings, load_settings, number
from bin_proxy.errors import BinProxyError, Busy, Interrupted, UsageError, clean
from bin_proxy.output.report import Report, echo, merge, when
from bin_proxy.policy.model import Binary

_EPILOG = f"""A setting may come from an option, the environment or the config file (NAME=value
lines), the first that names it counts: {", ".join(TABLE)}."""


def _setting(flag: str, name: str, metavar: str, help_text: str) -> Callable[[Any], Any]:
    parameter = name.removeprefix("BIN_PROXY_").lower()
    return click.option(flag, parameter, envvar=name, show_envvar=True, metavar=metavar, help=help_text)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG)
@_setting("--config", "BIN_PROXY_CONFIG", "FILE", "Config file.  [default: /etc/bin-proxy/config]")
@_setting("--api", "BIN_MANAGER_API", "URL", "URL of bin-manager's API.")
@_setting("--bin-dir", "BIN_DIR", "FOLDER", "Folder of the binaries.")
@_setting("--manifest", "BIN_MANIFESTS", "FILE", "The manifest.")
@_setting("--log-file", "LOG_FILE", "FILE", "Log file.")
@_setting("--state-dir", "STATE_DIR", "FOLDER", "Folder for lock, journal, holds and backups.")
@click.option("-v", "--verbose", is_flag=True, help="Tell every request and call.")
@click.option("-q", "--quiet", is_flag=True, help="Tell trouble only.")
@click.version_option(__version__, prog_name="bin-proxy")
def cli(**options: object) -> None:
    """Keep this host's binaries at the release that bin-manager names, and never break them.

    \b
    Examples:
      bin-proxy sync                       what cron runs every minute
      bin-proxy sync --only manager        one binary, now
      bin-proxy status                     what runs, and why it is not the latest
      bin-proxy rollback manager           back to the previous release
      bin-proxy pause manager --for 2h     leave it as it is
      bin-proxy doctor                     what is wrong with this host
    """


def _settings(context: Context) -> Settings:
    """By the options before the command. Raises UsageError."""
    options = {key.upper(): value for key, value in context.find_root().params.items()}
    return load_settings(options, os.environ)


def _report(context: Context, settings: Settings, *, terminal: bool) -> Report:
    options = context.find_root().params
    return Report(settings.log_file, terminal=terminal, verbose=options["verbose"] - options["quiet"])


def _manifest(settings: Settings, names: tuple[str, ...]) -> tuple[Binary, ...]:
    """The manifest, which must have `names`. Raises UsageError."""
    binaries = load_manifest(settings)
    known = [binary.name for binary in binaries]
    if unknown := [name for name in names if name not in known]:
        there = ", ".join(known) or "nothing"
        raise UsageError(f"the manifest {settings.manifest} has no {', '.join(unknown)}; it has {there}")
    return binaries


def _complete(context: Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The manifest's names, for the shell; none where they cannot be had."""
    with suppress(UsageError):
        return [b.name for b in load_manifest(_settings(context)) if b.name.startswith(incomplete)]
    return []


_only = click.option(
    "--only", multiple=True, metavar="NAME", shell_complete=_complete, help="Only this binary; may be repeated."
)
_names = click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=_complete)
_seconds = partial(click.option, type=number(0, 1e9), default="0", metavar="SECONDS")


@cli.command()
@_only
@click.option("--dry-run", is_flag=True, help="Say what would happen and why; change nothing.")
@click.option("--retry-held", is_flag=True, help="Try releases that are held or wait, too.")
@_seconds("--wait", help="Wait for another sync to end.")
@_seconds("--splay", help="Begin an update at this host's own moment within so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.pass_context
def sync(
    context: Context, only: tuple[str, ...], dry_run: bool, retry_held: bool, wait: float, splay: float, as_json: bool
) -> int:
    """Update what is outdated, and roll back what fails.

    Download, verify, back up, swap, restart, watch; if the service does not stay up, the previous release comes back.

    \b
    Exit codes: 0 all is where it should be, 1 something is not,
    2 usage, settings or manifest, 75 another sync is under way.

    \b
    Examples:
      bin-proxy sync --only manager --retry-held
      bin-proxy sync --dry-run
    """
    settings = _settings(context)
    from bin_proxy.host.lock import locked
    from bin_proxy.host.signals import Signals
    from bin_proxy.update.scheduler import Options, Sync, exit_code  # imports requests, which --help need not wait for

    binaries = _manifest(settings, only)
    watched = sys.stdout.isatty()
    report = _report(context, settings, terminal=watched and not as_json)
    options = Options(only, dry_run, retry_held, 0.0 if watched else splay)
    signals = Signals()
    with nullcontext() if dry_run else locked(settings.state_dir, wait):
        run = Sync(settings, binaries, options, report, signals)
        try:
            run.run()
        finally:
            report.progress(0, 0)
        order = {binary.name: at for at, binary in enumerate(binaries)}
        results = sorted(run.results.values(), key=lambda result: order.get(result.name, len(order)))
        code = exit_code(results, report.notes) if dry_run else run.finish(results)
    if as_json:
        keys = ("name", "outcome", "fromMd5", "toMd5", "seconds", "error")
        values = [(r.name, r.outcome, r.from_md5, r.to_md5, round(r.seconds, 3), r.error) for r in results]
        rows = [dict(zip(keys, row, strict=True)) for row in values]
        click.echo(json.dumps({"results": rows}, indent=2))
    elif dry_run:
        for result in results:
            what = "would be updated" if result.outcome == "updated" else result.outcome
            echo(f"{result.name}: {what}: {result.note or result.error}")
    return code


@cli.command()
@_only
@click.option("--offline", is_flag=True, help="Compare with bin-manager's last known answer.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--check", is_flag=True, help="Exit 1 unless all is well, for monitoring.")
@click.pass_context
def status(context: Context, only: tuple[str, ...], offline: bool, as_json: bool, check: bool) -> int:
    """Show what runs, why it is not the latest, and what to type next.

    \b
    Examples:
      bin-proxy status
      bin-proxy status --check --offline
    """
    from bin_proxy.commands.status import judge_last_sync, survey, table, to_json

    settings = _settings(context)
    binaries = tuple(b for b in _manifest(settings, only) if not only or b.name in only)
    views, state = survey(settings, binaries, offline=offline)
    findings = [finding for view in views for finding in view.findings]
    if as_json:
        click.echo(json.dumps(to_json(views, state.cache.last_sync), indent=2))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
        for line in table(views, width):
            click.echo(line, color=False if "NO_COLOR" in os.environ else None)
        for _, line in (*merge(findings), judge_last_sync(state.cache.last_sync)):
            echo(line)
    return int(check and not all(finding.well for finding in findings))


@cli.command()
@click.argument("name", shell_complete=_complete)
@click.option("--to", metavar="MD5", help="A kept release, or the beginning of its MD5; see status --json.")
@click.pass_context
def rollback(context: Context, name: str, to: str | None) -> None:
    """Go back to the previous release of NAME.

    The release that is left is held: sync leaves it alone.

    \b
    Examples:
      bin-proxy rollback manager
      bin-proxy rollback manager --to 0cc175b9
    """
    settings = _settings(context)
    from bin_proxy.commands import rollback as by_hand
    from bin_proxy.host.signals import Signals

    binaries = _manifest(settings, (name,))
    report = _report(context, settings, terminal=sys.stdout.isatty())
    echo(by_hand.roll_back(settings, binaries, name, to, report, Signals()))


@cli.command()
@_names
@click.option("--reason", default="", metavar="TEXT", help="For whoever comes next.")
@click.option("--for", "duration", metavar="DURATION", help="Until when: 30m, 2h, 1d, 1h30m; without it, until resume.")
@click.pass_context
def pause(context: Context, names: tuple[str, ...], reason: str, duration: str | None) -> None:
    """Leave binaries as they are; without NAME, the host.

    \b
    Examples:
      bin-proxy pause manager --reason "INC-42, ask Wei" --for 2h
      bin-proxy pause
    """
    from bin_proxy.commands import pause as by_hand

    settings = _settings(context)
    _manifest(settings, names)
    echo(by_hand.pause(settings, names, reason, duration))


@cli.command()
@_names
@click.pass_context
def resume(context: Context, names: tuple[str, ...]) -> None:
    """End the pause of binaries; without NAME, that of the host.

    \b
    Examples:
      bin-proxy resume manager
      bin-proxy resume
    """
    from bin_proxy.commands import pause as by_hand

    echo(by_hand.resume(_settings(context), names))


@cli.command()
@click.pass_context
def doctor(context: Context) -> int:
    """Say what is wrong with this host, and what to do.

    \b
    Examples:
      bin-proxy doctor | tee ticket.txt
    """
    from bin_proxy.commands.doctor import examine

    code = 0
    for well, line in examine(partial(_settings, context)):
        click.echo(clean(f"{'ok   ' if well else 'WRONG'}  {line}"))  # not wrapped: what to do is to be copied
        code = code if well else 1
    return code


def _fail(error: Exception) -> int:
    if isinstance(error, Busy):
        if time.time() - error.since > 900 or sys.stderr.isatty():
            echo(f"bin-proxy: {error} since {when(error.since)}", err=True)
        return 75
    for line in error.faults if isinstance(error, UsageError) else [str(error)]:
        click.echo(clean(f"bin-proxy: {line}"), err=True)  # not wrapped: what to do is to be copied
    return 2 if isinstance(error, UsageError) else 1


def main() -> None:
    """Run the command line and exit with its code."""
    os.umask(0o022)  # whatever the caller's is: modes that matter are given on purpose
    # Of those that the caller closed, /dev/null takes the number: no file of ours may get it and what is printed there.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(prog_name="bin-proxy", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = 130
    except (BinProxyError, OSError) as error:
        code = _fail(error)
    except Interrupted as error:
        from bin_proxy.host.process import kill_all

        kill_all()
        code = 128 + error.signum
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads any more
            stream.flush()
    # Not sys.exit: a thread that still hangs in a request must not hold up the end. None: a command without a verdict.
    os._exit(code or 0)
