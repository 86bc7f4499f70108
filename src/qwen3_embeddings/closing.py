"""Context managers for what has `close` and `aclose`."""

from __future__ import annotations

from typing import Self


class Closing:
    """Closes at the end of a ``with`` or ``async with`` block."""

    def close(self) -> None:
        """Release the resources."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Release the resources, for coroutines."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
