"""A vector store for LangChain: `from hnsw_gpu.langchain import HNSWVectorStore`.

Names and defaults are LangChain's, as its FAISS store has them where `VectorStore` says nothing.
"""

import copy
import operator
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from hnsw_gpu.documents import Documents, Found, Record, not_json, with_ef
from hnsw_gpu.files import Place
from hnsw_gpu.index import Index

try:
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import VectorStore
    from langchain_core.vectorstores.utils import maximal_marginal_relevance
except ImportError as error:
    raise ImportError(f'hnsw_gpu.langchain: {error}: pip install "hnsw-gpu[langchain]"') from None

__all__ = ["HNSWVectorStore"]

Filter: TypeAlias = dict[str, Any] | Callable[[Document], bool]
Condition: TypeAlias = Callable[[dict[str, Any]], bool]


class HNSWVectorStore(VectorStore):  # type: ignore[misc]
    """Documents searched by the vectors of their texts, on an HNSW graph.

    embedding: makes vectors of texts and of queries.
    ef: beam capacity of searches; more finds more of the true nearest. A search may say its own.
    relevance_score_fn: relevance, 0 to 1, of a distance; in place of the metric's own.
    options: of `hnsw_gpu.Index`: `metric`, "cosine" unless told otherwise, `dtype`, `M`,
        `ef_construction`, `refine`, `seed`, `device`.

    `filter` of a search is a function of a Document, or a dict: `{"lang": "en"}` is met by metadata
    that hold this value, `{"lang": ["en", "de"]}` by any of these, `{"year": {"$gte": 2020}}` by
    comparison ($eq, $ne, $gt, $gte, $lt, $lte, $in, $nin); all keys must be met. `$and` and `$or`
    take lists of such dicts, `$not` one. A filter costs no recall; it is tried on all documents.

    Other arguments of a search go to `Index.search`, such as `ef`, `recall` and `threads`. Scores
    are distances, smaller is nearer, but for `similarity_search_with_relevance_scores`. Methods may
    be called from many threads.
    """

    def __init__(
        self,
        embedding: Embeddings,
        *,
        ef: int = 64,
        relevance_score_fn: Callable[[float], float] | None = None,
        **options: Any,
    ) -> None:
        self._embedding = embedding
        self._documents = Documents(**options)
        self._relevance_score_fn = relevance_score_fn
        self.ef = ef

    @property
    def embeddings(self) -> Embeddings:
        """What makes vectors of texts."""
        return self._embedding

    @property
    def index(self) -> Index | None:
        """The `hnsw_gpu.Index`, whose labels are the ids: to tune, not to change. None if empty."""
        return self._documents.index

    def __len__(self) -> int:
        return len(self._documents)

    # ---------------------------------------------------------------- changing it

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: Sequence[dict[str, Any] | None] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
    ) -> list[str]:
        """Add texts, or replace those whose ids are here; returns all ids, new ones where None.

        metadatas: dicts of what JSON can hold; None is an empty one. ValueError where there are not
        as many metadatas or ids as texts, TypeError where they are something else.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts: {texts!r:.80}, expected a list of strings")
        given = list(texts)
        named, records = _named_records(given, metadatas, ids)  # before embedding is paid for
        vectors = self._embedding.embed_documents(given) if given else []
        self._documents.add(named, vectors, records)
        return named

    def add_embeddings(
        self,
        text_embeddings: Iterable[tuple[str, Sequence[float]]],
        metadatas: Sequence[dict[str, Any] | None] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
    ) -> list[str]:
        """As `add_texts`, of texts with their vectors."""
        pairs = list(text_embeddings)
        named, records = _named_records([text for text, _ in pairs], metadatas, ids)
        self._documents.add(named, [row for _, row in pairs], records)
        return named

    def delete(self, ids: Sequence[str] | None = None) -> bool:
        """Remove documents, all of them where `ids` is None; unknown ids are passed over."""
        if ids is None:
            self._documents.clear()
        else:
            self._documents.delete(ids)
        return True

    # ---------------------------------------------------------------- searching

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of ids that are here, in this order."""
        return [_document(id, record) for id, record in self._documents.records(ids)]

    def similarity_search(
        self, query: str, k: int = 4, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The k documents nearest to a text, nearest first."""
        vector = self._embedding.embed_query(query)
        return self.similarity_search_by_vector(vector, k, filter, **kwargs)

    def similarity_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The k documents nearest to a vector (dim,), nearest first."""
        found = self._found(embedding, k, filter, kwargs)
        return [_document(id, record) for id, record, _ in found]

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As `similarity_search`, each with its distance."""
        vector = self._embedding.embed_query(query)
        return self.similarity_search_with_score_by_vector(vector, k, filter, **kwargs)

    def similarity_search_with_score_by_vector(
        self, embedding: Sequence[float], k: int = 4, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As `similarity_search_by_vector`, each with its distance."""
        found = self._found(embedding, k, filter, kwargs)
        return [(_document(id, record), distance) for id, record, distance in found]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """k of the fetch_k nearest, near the text and unlike each other.

        lambda_mult: 0, as diverse as can be, to 1, as near.
        """
        return self.max_marginal_relevance_search_by_vector(
            self._embedding.embed_query(query), k, fetch_k, lambda_mult, filter, **kwargs
        )

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: Sequence[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """As `max_marginal_relevance_search`, of a vector (dim,)."""
        found, vectors = self._documents.search_vectors(
            embedding, max(k, fetch_k), self._allowed(filter), **with_ef(self.ef, kwargs)
        )
        query = np.asarray(embedding, np.float32)
        chosen = maximal_marginal_relevance(query, list(vectors), lambda_mult, k)
        return [_document(found[place].id, found[place].record) for place in chosen]

    def _found(
        self, vector: Sequence[float], k: int, filter: Filter | None, how: dict[str, Any]
    ) -> list[Found]:
        allow = self._allowed(filter)
        return self._documents.search(vector, k, allow, **with_ef(self.ef, how))

    def _allowed(self, filter: Filter | None) -> list[str] | None:
        return None if filter is None else self._documents.ids_where(_passing(filter))

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        """LangChain's names; held within 0 and 1, which it warns of otherwise."""
        if self._relevance_score_fn is not None:
            return self._relevance_score_fn
        of_metric = {
            "cosine": lambda distance: 1 - distance,  # the cosine itself
            "ip": lambda distance: 1 - distance,  # the product: that of unit vectors
            "l2": lambda distance: 1 - (distance / 2) ** 0.5,  # LangChain's, of its square
            "euclidean": lambda distance: 1 - distance / 2**0.5,
        }[self._documents.metric]
        return lambda distance: min(max(of_metric(distance), 0.0), 1.0)

    # ---------------------------------------------------------------- making and keeping it

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        embedding: Embeddings,
        metadatas: Sequence[dict[str, Any] | None] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> "HNSWVectorStore":
        """A store of texts. kwargs: as of the class."""
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    @classmethod
    def from_embeddings(
        cls,
        text_embeddings: Iterable[tuple[str, Sequence[float]]],
        embedding: Embeddings,
        metadatas: Sequence[dict[str, Any] | None] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> "HNSWVectorStore":
        """A store of texts with their vectors. kwargs: as of the class."""
        store = cls(embedding, **kwargs)
        store.add_embeddings(text_embeddings, metadatas, ids=ids)
        return store

    def save_local(self, folder_path: Place) -> None:
        """Write a folder, or save over the store in one; a crash leaves the old or the new one.

        TypeError names a document whose metadata JSON cannot hold.
        """
        self._documents.save(folder_path)

    @classmethod
    def load_local(
        cls,
        folder_path: Place,
        embeddings: Embeddings,
        *,
        ef: int = 64,
        relevance_score_fn: Callable[[float], float] | None = None,
        mmap: bool = False,
        device: str = "auto",
    ) -> "HNSWVectorStore":
        """The store in a folder, which holds no code: nothing dangerous is deserialized.

        embeddings: those it was made with. mmap, device: see `hnsw_gpu.load`. FileNotFoundError
        where there is none, CorruptIndexError where it is damaged.
        """
        store = cls(embeddings, ef=ef, relevance_score_fn=relevance_score_fn)
        store._documents = Documents.load(folder_path, mmap=mmap, device=device)
        return store


def _named_records(
    texts: list[str],
    metadatas: Sequence[dict[str, Any] | None] | None,
    ids: Sequence[str | None] | None,
) -> tuple[list[str], list[Record]]:
    """What is to be kept of texts, and by which ids; ValueError and TypeError as of `add_texts`."""
    metadatas = [None for _ in texts] if metadatas is None else metadatas
    ids = [None for _ in texts] if ids is None else ids
    for name, given in (("metadatas", metadatas), ("ids", ids)):
        if isinstance(given, (str, dict)):
            raise TypeError(f"{name}: {given!r:.80}, expected a list, one for each text")
    if not len(texts) == len(metadatas) == len(ids):
        raise ValueError(f"{len(texts)} texts, {len(metadatas)} metadatas and {len(ids)} ids")
    records = []
    for row, (text, metadata) in enumerate(zip(texts, metadatas, strict=True)):
        if not isinstance(text, str):
            raise TypeError(f"texts: {type(text).__name__} in row {row}, expected strings")
        if not isinstance(metadata, dict | None):
            told = type(metadata).__name__
            raise TypeError(f"metadatas: {told} in row {row}, expected dicts, or None")
        problem = not_json(metadata)
        if problem:  # the store could not be saved
            raise TypeError(f"metadatas: row {row} has {problem}: expected what JSON can hold")
        records.append(Record(text, copy.deepcopy(metadata or {})))
    return [str(uuid.uuid4()) if id is None else id for id in ids], records


def _document(id: str, record: Record) -> Document:
    metadata = copy.deepcopy(record.metadata)  # a caller may write into it
    return Document(id=id, page_content=record.text, metadata=metadata)


# ---------------------------------------------------------------- filters


def _passing(filter: Filter) -> Callable[[str, Record], bool]:
    """A filter as `Documents.ids_where` takes it; ValueError says what is wrong with it."""
    if callable(filter):
        return lambda id, record: bool(filter(_document(id, record)))
    is_met = _condition(filter)
    return lambda _, record: is_met(record.metadata)


def _condition(filter: Any) -> Condition:
    """A dict as a condition on metadata."""
    if not isinstance(filter, dict):
        raise ValueError(f"filter: {filter!r:.80}, expected a dict or a function")
    return _every([_part(key, wanted) for key, wanted in filter.items()])


def _every(parts: list[Condition]) -> Condition:
    """The condition that all are met. One alone is itself: a filter takes a fifth of the time."""
    return parts[0] if len(parts) == 1 else lambda metadata: all(part(metadata) for part in parts)


def _part(key: str, wanted: Any) -> Condition:
    """The condition of one key of a filter."""
    if key in ("$and", "$or"):
        if not isinstance(wanted, (list, tuple)):
            raise ValueError(f"filter: {key} takes a list of dicts, not {wanted!r:.80}")
        parts = [_condition(part) for part in wanted]
        return _every(parts) if key == "$and" else lambda m: any(part(m) for part in parts)
    if key == "$not":
        inner = _condition(wanted)
        return lambda metadata: not inner(metadata)
    if str(key).startswith("$"):
        raise ValueError(f"filter: {key}, expected $and, $or, $not or a key of the metadata")
    if isinstance(wanted, list):
        wanted = {"$in": wanted}
    if not (isinstance(wanted, dict) and any(str(name).startswith("$") for name in wanted)):
        wanted = {"$eq": wanted}
    unknown = [name for name in wanted if name not in OPERATORS]
    if unknown:
        raise ValueError(f"filter: {unknown[0]} of {key!r}, expected one of {', '.join(OPERATORS)}")
    for name in {"$in", "$nin"} & wanted.keys():
        if not isinstance(wanted[name], (list, tuple, set, frozenset)):
            raise ValueError(f"filter: {name} of {key!r} takes a list, not {wanted[name]!r:.80}")
    return _every([_test(key, OPERATORS[name], value) for name, value in wanted.items()])


def _test(key: str, compare: Callable[[Any, Any], bool], wanted: Any) -> Condition:
    return lambda metadata: compare(metadata.get(key), wanted)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """A comparison that values of unlike kinds, or none, do not meet."""

    def is_met(value: Any, wanted: Any) -> bool:
        try:
            return bool(compare(value, wanted))
        except TypeError:
            return False

    return is_met


OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$ne": operator.ne,
    "$gt": _ordered(operator.gt),
    "$gte": _ordered(operator.ge),
    "$lt": _ordered(operator.lt),
    "$lte": _ordered(operator.le),
    "$in": lambda value, wanted: value in wanted,
    "$nin": lambda value, wanted: value not in wanted,
}
