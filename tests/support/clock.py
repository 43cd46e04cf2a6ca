"""Another time for single processes, also while they run; deadlines, which go by another clock, are left alone.

SPDX-License-Identifier: Apache-2.0

Debian's faketime moves the monotonic clock, too, and Python 3.11 then sleeps for as long as the clocks are apart.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    char text[32] = {0};
    const char *path = getenv("TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atol(text);
}

int clock_gettime(clockid_t id, struct timespec *out) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, out);
    if (!code && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) out->tv_sec += offset();
    return code;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    (void)zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


def lacks_compiler() -> str:
    """What this machine lacks for it; empty when nothing."""
    return "" if shutil.which("cc") else "no C compiler (apt install gcc libc6-dev)"


class Clock:
    """A clock that is off by some seconds, for processes that are started with its `environment`."""

    def __init__(self, folder: Path) -> None:
        self._file, library = folder / "clock", folder / "clock.so"
        (folder / "clock.c").write_text(_SOURCE)
        subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(folder / "clock.c"), "-ldl"], check=True
        )
        self.environment = {"LD_PRELOAD": str(library), "TEST_CLOCK": str(self._file)}
        self.set(0)

    def set(self, seconds: int) -> None:
        """Put it so far ahead of the machine's, at once."""
        other = self._file.with_suffix(".new")
        other.write_text(str(seconds))
        other.replace(self._file)
