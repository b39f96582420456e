"""A vector store for LlamaIndex: `from hnsw_gpu.llama_index import HNSWVectorStore`."""

import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hnsw_gpu.documents import Documents, Found, Record, with_ef
from hnsw_gpu.files import Folder, folder_at
from hnsw_gpu.index import Index

try:
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
    from llama_index.core.schema import BaseNode, MetadataMode
    from llama_index.core.vector_stores.types import (
        DEFAULT_PERSIST_DIR,
        DEFAULT_PERSIST_FNAME,
        BasePydanticVectorStore,
        FilterCondition,
        MetadataFilters,
        VectorStoreQuery,
        VectorStoreQueryMode,
        VectorStoreQueryResult,
    )
    from llama_index.core.vector_stores.utils import (
        build_metadata_filter_fn,
        metadata_dict_to_node,
        node_to_metadata_dict,
    )
except ImportError as error:
    raise ImportError(
        f'hnsw_gpu.llama_index: {error}: pip install "hnsw-gpu[llama-index]"'
    ) from None

__all__ = ["HNSWVectorStore"]

MMR_FETCHED = 4  # nodes to choose from, for each that is asked for


class HNSWVectorStore(BasePydanticVectorStore):  # type: ignore[misc]
    """Nodes searched by their embeddings, on an HNSW graph.

    ef: beam capacity of searches; more finds more of the true nearest. A query may say its own.
    options: of `hnsw_gpu.Index`: `metric`, "cosine" unless told otherwise, `dtype`, `M`,
        `ef_construction`, `refine`, `seed`, `device`.

    It keeps whole nodes: no document store is needed. Filters mean what they mean to LlamaIndex's
    SimpleVectorStore, and may be nested; they cost no recall, and are tried on all nodes.
    Similarities are cosines or dot products, and distances times -1 under "l2" and "euclidean".
    Methods may be called from many threads.
    """

    stores_text: bool = True
    ef: int = 64
    _documents: Documents = PrivateAttr()

    def __init__(self, *, ef: int = 64, **options: Any) -> None:
        super().__init__(stores_text=True, ef=ef)
        self._documents = Documents(**options)

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name of the class."""
        return "HNSWVectorStore"

    @property
    def client(self) -> Index | None:
        """The `hnsw_gpu.Index`, whose labels are node ids: to tune, not to change. None: empty."""
        return self._documents.index

    # ---------------------------------------------------------------- changing it

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: Any) -> list[str]:
        """Add nodes with embeddings, or replace those whose ids are here; returns their ids."""
        ids = [node.node_id for node in nodes]
        vectors = [node.get_embedding() for node in nodes]
        self._documents.add(ids, vectors, [_record(node) for node in nodes])
        return ids

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove the nodes of a document."""
        self._documents.delete(self._documents.ids_where(_of_documents([ref_doc_id])))

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Remove the nodes that have one of the ids and pass the filters."""
        self._documents.delete(self._chosen(node_ids, filters))

    def clear(self) -> None:
        """Remove all nodes."""
        self._documents.clear()

    # ---------------------------------------------------------------- searching

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """The nodes that have one of the ids and pass the filters, without embeddings."""
        records = self._documents.records(self._chosen(node_ids, filters))
        return [_node(record) for _, record in records]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nodes most similar to an embedding, that pass the filters, the ids and the documents.

        kwargs: `mmr_threshold` of mode "mmr" (1: as similar as can be, 0: as diverse), and
            `mmr_prefetch_k`, the nodes it chooses from; others go to `Index.search`.
        """
        if query.query_embedding is None:
            raise ValueError("query: there is no query_embedding")
        how = with_ef(self.ef, dict(kwargs))
        threshold = how.pop("mmr_threshold", query.mmr_threshold)
        fetched = how.pop("mmr_prefetch_k", MMR_FETCHED * query.similarity_top_k)
        node_ids = query.node_ids or None  # retrievers give an empty list where they mean all
        restricted = (node_ids, query.filters, query.doc_ids)
        allow = None if restricted == (None, None, None) else self._chosen(*restricted)
        vector, k = query.query_embedding, query.similarity_top_k
        if query.mode == VectorStoreQueryMode.DEFAULT:
            found = self._documents.search(vector, k, allow, **how)
            return _result(found, [self._similarity(one.distance) for one in found])
        if query.mode != VectorStoreQueryMode.MMR:
            asked = VectorStoreQueryMode(query.mode).value
            raise ValueError(f'query: mode {asked!r}, expected "default" or "mmr"')
        found, rows = self._documents.search_vectors(vector, max(k, fetched), allow, **how)
        similarities, places = get_top_k_mmr_embeddings(
            vector, rows.tolist(), similarity_top_k=k, mmr_threshold=threshold
        )
        return _result([found[place] for place in places], similarities)

    def _similarity(self, distance: float) -> float:
        return 1 - distance if self._documents.metric in ("cosine", "ip") else -distance

    def _chosen(
        self,
        node_ids: list[str] | None,
        filters: MetadataFilters | None,
        doc_ids: list[str] | None = None,
    ) -> list[str]:
        """The ids of the nodes that pass; None: any does."""
        chosen = node_ids
        if doc_ids is not None:
            chosen = self._documents.ids_where(_of_documents(doc_ids), chosen)
        passes = _condition(filters or MetadataFilters(filters=[]))
        return self._documents.ids_where(lambda _, record: passes(record.metadata), chosen)

    # ---------------------------------------------------------------- keeping it

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Write a folder of this path, or save over the store in one.

        A crash leaves the old store or the new one. fs: fsspec's file system of the path; None:
        this machine's, or that of a URL.
        """
        self._documents.save(_folder(persist_path, fs))

    @classmethod
    def from_persist_path(
        cls,
        persist_path: str,
        fs: Any = None,
        *,
        ef: int = 64,
        mmap: bool = False,
        device: str = "auto",
    ) -> "HNSWVectorStore":
        """The store that `persist` wrote. mmap, device: see `hnsw_gpu.load`.

        FileNotFoundError where there is none, CorruptIndexError where it is damaged.
        """
        store = cls(ef=ef)
        store._documents = Documents.load(_folder(persist_path, fs), mmap=mmap, device=device)
        return store

    @classmethod
    def from_persist_dir(
        cls,
        persist_dir: str = DEFAULT_PERSIST_DIR,
        namespace: str = "default",
        fs: Any = None,
        **options: Any,
    ) -> "HNSWVectorStore":
        """The store that `StorageContext.persist` wrote into a folder.

        options: as of `from_persist_path`.
        """
        path = posixpath.join(persist_dir, f"{namespace}__{DEFAULT_PERSIST_FNAME}")
        return cls.from_persist_path(path, fs, **options)


def _record(node: BaseNode) -> Record:
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    return Record(text, node_to_metadata_dict(node, remove_text=True))


def _node(record: Record) -> BaseNode:
    return metadata_dict_to_node(record.metadata, text=record.text)


def _result(found: list[Found], similarities: list[float]) -> VectorStoreQueryResult:
    return VectorStoreQueryResult(
        nodes=[_node(record) for _, record, _ in found],
        similarities=similarities,
        ids=[id for id, _, _ in found],
    )


def _of_documents(doc_ids: Sequence[str]) -> Callable[[str, Record], bool]:
    wanted = set(doc_ids)
    return lambda _, record: record.metadata.get("ref_doc_id") in wanted


def _condition(filters: MetadataFilters) -> Callable[[Mapping[str, Any]], bool]:
    """Filters as a condition on metadata; each one is LlamaIndex's own."""
    parts = [
        _condition(part) if isinstance(part, MetadataFilters) else _test(part)
        for part in filters.filters
    ]
    if not parts:
        return lambda _: True
    if filters.condition == FilterCondition.OR:
        return lambda metadata: any(part(metadata) for part in parts)
    if filters.condition == FilterCondition.NOT:
        return lambda metadata: not any(part(metadata) for part in parts)
    return lambda metadata: all(part(metadata) for part in parts)


def _test(one: Any) -> Callable[[Mapping[str, Any]], bool]:
    """One filter; ValueError names it where a value does not suit its operator."""
    # what it looks up by an id is given here in place of the id
    is_met = build_metadata_filter_fn(lambda given: given, MetadataFilters(filters=[one]))

    def passes(metadata: Mapping[str, Any]) -> bool:
        try:
            return bool(is_met(metadata))
        except TypeError as error:
            operator = getattr(one.operator, "value", one.operator)
            told = f"filter: {one.key!r} {operator} {one.value!r:.60}, and there is"
            raise ValueError(f"{told} {metadata.get(one.key)!r:.60}: {error}") from None

    return passes


def _folder(path: str, fs: Any) -> Folder:
    """The folder of a path on one of fsspec's file systems."""
    if fs is None:
        return folder_at(path)
    is_local = "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)
    return folder_at(path) if is_local else folder_at(fs.unstrip_protocol(path), fs.storage_options)
