"""An embeddings cache that knows whose vector a text's is.

LlamaIndex looks a vector up by its text alone, so a query would be answered with the document of
equal text, and a model with the vectors of another.
"""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.storage.kvstore.types import DEFAULT_COLLECTION, BaseKVStore

from qwen3_embeddings import Embedder
from qwen3_embeddings.embedder import Role


class Query(str):
    """A query on its way through `BaseEmbedding`, which looks all texts up alike."""

    __slots__ = ()


class RoleAwareStore(BaseKVStore):
    """A store whose keys begin with the fingerprint of a model and a role.

    Args:
        store: where the vectors are kept. Any number of models may share it.
        embedder: whose vectors they are.
    """

    def __init__(self, store: BaseKVStore, embedder: Embedder) -> None:
        self.store: BaseKVStore = store.store if isinstance(store, RoleAwareStore) else store
        self._embedder = embedder
        self._fingerprints: dict[Role, str] = {}

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        """Keep a text's vector, where there is one."""
        if all(val.values()):
            self.store.put(self._key(key), val, collection)

    async def aput(
        self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION
    ) -> None:
        """Keep a text's vector, where there is one."""
        if all(val.values()):
            await self.store.aput(await self._akey(key), val, collection)

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """A text's vector, or None."""
        return self.store.get(self._key(key), collection)

    async def aget(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        """A text's vector, or None."""
        return await self.store.aget(await self._akey(key), collection)

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """All the store holds, under the keys it holds them by."""
        return self.store.get_all(collection)

    async def aget_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        """All the store holds, under the keys it holds them by."""
        return await self.store.aget_all(collection)

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Forget a text's vector; False when there is none."""
        return self.store.delete(self._key(key), collection)

    async def adelete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        """Forget a text's vector; False when there is none."""
        return await self.store.adelete(await self._akey(key), collection)

    def _key(self, text: str) -> str:
        role = _role(text)
        if role not in self._fingerprints:
            self._fingerprints[role] = self._embedder.fingerprint(role)
        # In quotes, so that None, which is refused later, is not taken for the text "None".
        return f"{self._fingerprints[role]}:{text!r}"

    async def _akey(self, text: str) -> str:
        if _role(text) not in self._fingerprints:  # may have to ask the server for its model
            return await asyncio.to_thread(self._key, text)
        return self._key(text)


def _role(text: str) -> Role:
    return "query" if isinstance(text, Query) else "document"
