"""Find out whether code closes the engines that it starts."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from qwen3_embeddings.engines.registry import Lease


@contextmanager
def all_closed() -> Iterator[None]:
    """Fail at the end of the block if an engine would run on without the holders outside of it.

    It follows the registry's rule: the last lease that is released stops the engine, and one that
    is garbage-collected does not.
    """
    held: dict[str, weakref.WeakSet[Lease]] = defaultdict(weakref.WeakSet)
    running: set[str] = set()
    acquire, share, detach = Lease._acquire, Lease.share, Lease.detach

    def record_acquire(lease: Lease) -> None:
        acquire(lease)
        held[lease._key].add(lease)
        running.add(lease._key)

    def record_share(lease: Lease) -> Any:
        other = share(lease)
        held[other._key].add(other)
        return other

    def record_detach(lease: Lease) -> Any:
        held[lease._key].discard(lease)
        if not held[lease._key]:
            running.discard(lease._key)
        return detach(lease)

    with (
        patch.object(Lease, "_acquire", record_acquire),
        patch.object(Lease, "share", record_share),
        patch.object(Lease, "detach", record_detach),
    ):
        yield
    assert held, "nothing was opened"
    assert not running, f"{len(running)} engines would run on"
