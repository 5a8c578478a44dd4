"""A clock that a test sets: a small library, preloaded, under which one program believes in another date.

Only CLOCK_REALTIME is concerned. Monotonic clocks, sleeps and the dates of files are the host's, as they are where
somebody sets the clock of a real host.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests.conftest import require

# Python before 3.11 waits for locks by the date, so that such waits have to be told what the date really is.
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long ahead(void)
{
    char text[32] = "";
    const char *told = getenv("CLOCK_AHEAD");
    if (told && *told == '/') {
        int fd = open(told, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || read(fd, text, sizeof text - 1) < 0)
            text[0] = 0;
        if (fd >= 0)
            close(fd);
        told = text;
    }
    return told ? atol(told) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME)
        now->tv_sec += ahead();
    return failed;
}

time_t time(time_t *told)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told)
        *told = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict told, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return 0;
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until)
{
    static int (*real)(sem_t *, const struct timespec *);
    struct timespec moved = *until;
    if (!real)
        real = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    moved.tv_sec -= ahead();
    return real(semaphore, &moved);
}
"""


@functools.cache
def _library() -> str:
    """Compile the library, once a test run and worker."""
    require("cc")
    folder = Path(tempfile.mkdtemp(prefix="clock"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "clock.c").write_text(_SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", "clock.so", "clock.c", "-ldl"], cwd=folder, check=True)
    return str(folder / "clock.so")


def at(moment: float) -> dict[str, str]:
    """The environment under which a program that starts now believes that it is `moment` (Unix time)."""
    return {"LD_PRELOAD": _library(), "CLOCK_AHEAD": str(round(moment - time.time()))}


def by(file: Path) -> dict[str, str]:
    """The environment under which a program's clock is ahead by the seconds that stand in `file`, at any time."""
    assert os.path.isabs(file)
    return {"LD_PRELOAD": _library(), "CLOCK_AHEAD": str(file)}
