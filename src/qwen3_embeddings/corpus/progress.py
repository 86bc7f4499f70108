"""Progress of a job: rates and the time left, on a terminal or in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

WINDOW = 60.0
"""Seconds that the rates and the time left are computed from."""


@dataclass
class Counts:
    """Running totals.

    Attributes:
        rows: rows written.
        tokens: tokens embedded, as far as the engine reports them.
        rejects: rows rejected.
        shards: shards committed.
        weight: bytes of input done.
    """

    rows: int = 0
    tokens: int = 0
    rejects: int = 0
    shards: int = 0
    weight: int = 0

    def add(self, other: Counts) -> None:
        """Add the counts of a part of the job."""
        self.rows += other.rows
        self.rejects += other.rejects
        self.shards += other.shards
        self.weight += other.weight
        self.tokens += other.tokens


@dataclass
class Progress:
    """Counts what a job does, and prints it.

    On a terminal one line is updated every second. Elsewhere a line per minute is printed.

    Args:
        total: bytes of input in the whole job.
        done: bytes of input that earlier runs finished.
        tokens: returns the tokens embedded so far. Default: those that were added.
        out: where to print; None for nowhere.
    """

    total: int
    done: int
    tokens: Callable[[], int] | None = None
    out: TextIO | None = None
    counts: Counts = field(default_factory=Counts)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self._samples: deque[tuple[float, int, int, int]] = deque()
        self._sample()

    def add(self, counts: Counts) -> None:
        """Add what was just done; threads may call it."""
        with self._lock:
            self.counts.add(counts)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Print the progress until the block ends."""
        if self.out is None:
            yield
            return
        ended = threading.Event()
        printer = threading.Thread(target=self._print, args=(self.out, ended), daemon=True)
        printer.start()
        try:
            yield
        finally:
            ended.set()
            printer.join()

    def _print(self, out: TextIO, ended: threading.Event) -> None:
        terminal = out.isatty()
        while not ended.wait(1.0 if terminal else WINDOW):
            print(f"\r\x1b[2K{self.line()}" if terminal else self.line(),
                  end="" if terminal else "\n", file=out, flush=True)  # fmt: skip
        if terminal:
            print("\r\x1b[2K", end="", file=out, flush=True)

    def _sample(self) -> tuple[float, int, int, int]:
        tokens = self.tokens() if self.tokens else self.counts.tokens
        sample = (time.monotonic(), self.counts.weight, self.counts.rows, tokens)
        self._samples.append(sample)
        while self._samples[0][0] < sample[0] - WINDOW and len(self._samples) > 2:
            self._samples.popleft()
        return sample

    def line(self) -> str:
        """Return the state in one line."""
        first = self._samples[0]
        last = self._sample()
        seconds = max(last[0] - first[0], 1e-9)
        weight, rows, tokens = ((last[i] - first[i]) / seconds for i in (1, 2, 3))
        share = (self.done + last[1]) / self.total if self.total else 1.0
        left = (self.total - self.done - last[1]) / weight if weight else None
        parts = [f"{min(share, 1.0):.1%}", f"{self.counts.rows:,} rows", f"{rows:,.0f} rows/s"]
        if tokens:
            parts.append(f"{tokens:,.0f} tokens/s")
        parts.append(f"{duration(left)} left" if left is not None else "time left unknown")
        if self.counts.rejects:
            parts.append(f"{self.counts.rejects:,} rejects")
        return ", ".join(parts)

    def seconds(self) -> float:
        """Return the seconds since the job started."""
        return time.monotonic() - self.started


def duration(seconds: float) -> str:
    """Return a duration for reading, such as "2 h 05 min"."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def printer(enabled: bool) -> TextIO | None:
    """Return where progress goes."""
    return sys.stderr if enabled else None
