"""The commands: options in, words, tables, JSON and exit codes out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import click

from bin_proxy import __version__
from bin_proxy.errors import BinProxyError, Busy, Interrupted, UsageError, host_error
from bin_proxy.manifest import Binary, load_manifest
from bin_proxy.process import kill_all
from bin_proxy.report import clean
from bin_proxy.settings import Settings, load_settings

_SETTINGS_HELP = """\b
Every setting may come from an option, the environment or the config file (NAME=value lines), in this order:
  BIN_MANAGER_API, BIN_MANAGER_TOKEN, BIN_MANAGER_TOKEN_FILE, BIN_MANAGER_CA_BUNDLE, BIN_MANAGER_CLIENT_CERT,
  BIN_MANAGER_CLIENT_KEY, BIN_DIR, BIN_MANIFESTS, LOG_FILE, STATE_DIR, SUPERVISORCTL, HTTP_TIMEOUT,
  DOWNLOAD_TIMEOUT, MAX_DOWNLOAD_MIB, RESTART_TIMEOUT, MIN_HEALTHY_SECONDS, HEALTH_TIMEOUT, BACKUPS_KEEP, JOBS,
  METRICS_FILE

\b
Examples:
  bin-proxy sync                       what cron runs every minute
  bin-proxy sync --only manager        one binary, now
  bin-proxy status                     what runs, and why it is not the latest
  bin-proxy rollback manager           back to the previous release
  bin-proxy pause manager --for 2h     leave it as it is
  bin-proxy doctor                     what is wrong with this host
"""


@dataclass(frozen=True)
class Context:
    """The options before the command; the settings are worked out by the command that needs them."""

    options: dict[str, str | None]
    verbose: int

    def settings(self) -> Settings:
        """Load the settings. Raises UsageError."""
        return load_settings(self.options, os.environ)  # type: ignore[arg-type]


def _setting(flag: str, name: str, help_text: str) -> Callable[[Any], Any]:
    return click.option(flag, name.lower(), envvar=name, show_envvar=True, metavar="TEXT", help=help_text)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_SETTINGS_HELP)
@_setting("--config", "BIN_PROXY_CONFIG", "Config file.  [default: /etc/bin-proxy/config]")
@_setting("--api", "BIN_MANAGER_API", "URL of bin-manager's API.")
@_setting("--bin-dir", "BIN_DIR", "Folder of the binaries.")
@_setting("--manifest", "BIN_MANIFESTS", "The manifest.")
@_setting("--log-file", "LOG_FILE", "Log file.")
@_setting("--state-dir", "STATE_DIR", "Folder for lock, journal, holds and backups.")
@click.option("-v", "--verbose", is_flag=True, help="Tell every request and call.")
@click.option("-q", "--quiet", is_flag=True, help="Tell trouble only.")
@click.version_option(__version__, prog_name="bin-proxy")
@click.pass_context
def cli(context: click.Context, /, verbose: bool, quiet: bool, **options: str | None) -> None:
    """Keep this host's binaries at the release that bin-manager names, and never break them."""
    named = {key.upper(): value for key, value in options.items()}
    named["CONFIG"] = named.pop("BIN_PROXY_CONFIG")
    context.obj = Context(named, int(verbose) - int(quiet))


_only = click.option("--only", multiple=True, metavar="NAME", help="Only this binary; may be repeated.")


@cli.command()
@_only
@click.option("--dry-run", is_flag=True, help="Say what would happen and why; change nothing.")
@click.option("--retry-held", is_flag=True, help="Try releases that are held or wait, too.")
@click.option("--wait", type=click.FloatRange(0), default=0.0, metavar="SECONDS", help="Wait for another sync to end.")
@click.option("--splay", type=click.FloatRange(0), default=0.0, metavar="SECONDS", help="Spread a fleet's updates.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.pass_obj
def sync(
    context: Context, only: tuple[str, ...], dry_run: bool, retry_held: bool, wait: float, splay: float, as_json: bool
) -> int:
    """Update what is outdated: download, verify, back up, swap, restart, watch, roll back if need be.

    \b
    Exit codes: 0 all is where it should be, 1 something is not, 2 usage, settings or manifest,
    75 another sync is under way.

    \b
    Examples:
      bin-proxy sync --only manager --retry-held
      bin-proxy sync --dry-run
    """
    settings = context.settings()
    from bin_proxy.guard import Signals, locked
    from bin_proxy.report import Report
    from bin_proxy.sync import Options, Sync, exit_code  # imports requests, which --help need not wait for

    binaries = _manifest(settings, only)
    terminal = sys.stdout.isatty() and not as_json
    report = Report(settings.log_file, terminal=terminal, verbose=context.verbose)
    options = Options(only, dry_run, retry_held, 0.0 if sys.stdout.isatty() else splay)
    signals = Signals()
    with nullcontext() if dry_run else locked(settings.state_dir, wait):
        run = Sync(settings, binaries, options, report, signals, lambda parts: None)
        run.run()
        results = [run.results[binary.name] for binary in binaries if binary.name in run.results]
        results += [result for name, result in run.results.items() if name not in {binary.name for binary in binaries}]
        code = exit_code(results, run.troubles) if dry_run else run.finish(results)
    if as_json:
        keys = {"name": "name", "outcome": "outcome", "fromMd5": "from_md5", "toMd5": "to_md5", "error": "error"}
        rows = [{key: getattr(result, field) for key, field in keys.items()} for result in results]
        rows = [{**row, "seconds": round(result.seconds, 3)} for row, result in zip(rows, results, strict=True)]
        click.echo(json.dumps({"results": rows}, indent=2))
    elif dry_run:
        for result in results:
            what = "would be updated" if result.outcome == "updated" else result.outcome
            click.echo(clean(f"{result.name}: {what}: {result.error or result.note}"))
    return code


def _manifest(settings: Settings, names: Iterable[str]) -> tuple[Binary, ...]:
    """The manifest, of which `names` must be. Raises UsageError."""
    binaries = load_manifest(settings)
    known = [binary.name for binary in binaries]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"the manifest {settings.manifest} has no {', '.join(unknown)}; it has {', '.join(known) or 'nothing'}"
        )
    return binaries


def _fail(error: BinProxyError) -> int:
    if isinstance(error, Busy):
        old = error.since is not None and time.time() - error.since > 900
        if old or sys.stderr.isatty():
            since = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(error.since)) if error.since else ""
            click.echo(f"bin-proxy: another bin-proxy is at work{since}", err=True)
        return 75
    lines = error.faults if isinstance(error, UsageError) else (str(error),)
    for line in lines:
        click.echo(clean(f"bin-proxy: {line}"), err=True)
    return 2 if isinstance(error, UsageError) else 1


def main() -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as ended:
        code = ended.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = 130
    except BinProxyError as error:
        code = _fail(error)
    except OSError as error:
        code = _fail(host_error("go on", error))
    except Interrupted as error:
        kill_all()
        code = 128 + error.signum
    with suppress(OSError):
        sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)
