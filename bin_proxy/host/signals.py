"""Signals that ask to end wait for a swap to be finished."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from bin_proxy.errors import Interrupted

_ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM


class Signals:
    """Turns a signal that would end the run into `Interrupted`, at once or at the end of what must not be cut."""

    def __init__(self) -> None:
        self._held = False
        self._came: int | None = None
        for signum in _ENDING:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup(1) wants SIGHUP ignored
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: object) -> None:
        self._came = signum
        if not self._held:
            raise Interrupted(signum)
        with suppress(OSError):  # it may be the terminal's end that this signal tells of
            if os.isatty(2):
                os.write(2, b"\nbin-proxy: this ends once the update is finished or undone\n")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Until this ends, a signal waits.

        Raises:
            Interrupted: at the end, if one came.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._came is not None:
                raise Interrupted(self._came)
