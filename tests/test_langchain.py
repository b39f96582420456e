"""hnsw_gpu.langchain: what LangChain's own tests (`test_langchain_suite.py`) do not ask."""

import asyncio
import pickle

import numpy as np
import pytest

pytest.importorskip("langchain_core", reason="LangChain comes with the extra `langchain`")

from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from hnsw_gpu.langchain import HNSWVectorStore

EMBEDDING = DeterministicFakeEmbedding(size=8)
TEXTS = [f"text {number}" for number in range(30)]
METADATAS = [{"number": number, "lang": ("en", "de", "fr")[number % 3]} for number in range(30)]
for metadata in METADATAS[1::2]:
    metadata["odd"] = True
IDS = [f"id {number}" for number in range(30)]


def filled(**options):
    return HNSWVectorStore.from_texts(TEXTS, EMBEDDING, METADATAS, ids=IDS, **options)


def ids_of(documents):
    return [document.id for document in documents]


def cosine_distances(query):
    """The distance of each text, by id."""
    rows = np.array(EMBEDDING.embed_documents(TEXTS))
    vector = np.array(EMBEDDING.embed_query(query))
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector)
    return dict(zip(IDS, 1 - rows @ vector / lengths, strict=True))


def test_nobody_writes_into_the_store_from_outside():
    given = {"tags": ["a"]}
    store = HNSWVectorStore.from_texts(["text"], EMBEDDING, [given], ids=["1"])
    given["tags"].append("b")
    store.get_by_ids(["1"])[0].metadata["tags"].append("c")
    (found,) = store.similarity_search("text")
    found.metadata["tags"].append("d")
    assert store.get_by_ids(["1"])[0].metadata == {"tags": ["a"]}


def test_a_text_is_a_string():
    store = filled()
    with pytest.raises(TypeError, match="texts: NoneType in row 0, expected strings"):
        store.add_embeddings([(None, EMBEDDING.embed_query("a"))])
    assert len(store.similarity_search("a", k=100)) == len(IDS)


class Counting(DeterministicFakeEmbedding):
    """An embedding that is paid for."""

    made: int = 0

    def embed_documents(self, texts):
        self.made += len(texts)
        return super().embed_documents(texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], [{}, "oops"]), "metadatas: str in row 1, expected dicts"),
        ((["a"], {"lang": "en"}), "metadatas: {'lang': 'en'}, expected a list"),
        ((["a", "b"], [{}, {"at": [(1, 2)]}]), r"metadatas: row 1 has \(1, 2\), a tuple: expected"),
        ((["a"], [{"in": {3: "x"}}]), "metadatas: row 0 has the key 3, which is no string"),
        ((["a", "b"], None, "12"), "ids: '12', expected a list"),
        (("abc",), "texts: 'abc', expected a list of strings"),
    ],
)
def test_bad_input_is_refused_before_it_is_embedded(arguments, message):
    embedding = Counting(size=8)
    store = HNSWVectorStore(embedding)
    texts, metadatas, ids = (*arguments, None, None)[:3]
    with pytest.raises(TypeError, match=message):
        store.add_texts(texts, metadatas, ids=ids)
    assert embedding.made == 0 == len(store)


def test_none_is_no_metadata():
    store = HNSWVectorStore.from_texts(["a", "b"], EMBEDDING, [None, {"x": 1}], ids=["1", "2"])
    assert [one.metadata for one in store.get_by_ids(["1", "2"])] == [{}, {"x": 1}]
    assert ids_of(store.similarity_search("a", filter={"x": 1})) == ["2"]


def test_ids_are_a_list():
    store = HNSWVectorStore.from_texts(["a", "b"], EMBEDDING, ids=["1", "2"])
    for refused in (store.delete, store.get_by_ids):
        with pytest.raises(TypeError, match="ids: '12', expected a list of strings"):
            refused("12")
    assert len(store) == 2


def test_a_recall_takes_the_place_of_the_stores_ef():
    store = filled(ef=200)
    found = store.index.tune(0.9, k=4, queries=np.array(EMBEDDING.embed_documents(TEXTS[:5])))
    same = ids_of(store.similarity_search("a", recall=0.9))
    assert same == ids_of(store.similarity_search("a", ef=found.ef))
    store.index.tune(0.9, k=20, queries=np.array(EMBEDDING.embed_documents(TEXTS[:5])))
    assert len(store.max_marginal_relevance_search("a", recall=0.9)) == 4


def test_searches_tell_the_nearest_and_how_far():
    store, distances = filled(), cosine_distances("a question")
    nearest = sorted(IDS, key=distances.__getitem__)
    vector = EMBEDDING.embed_query("a question")
    assert ids_of(store.similarity_search("a question")) == nearest[:4]
    assert ids_of(store.similarity_search_by_vector(vector, k=7)) == nearest[:7]
    for found in (
        store.similarity_search_with_score("a question", k=30),
        store.similarity_search_with_score_by_vector(vector, k=30),
    ):
        assert ids_of(document for document, _ in found) == nearest
        assert [distance for _, distance in found] == pytest.approx(
            [distances[id] for id in nearest], abs=1e-6
        )
    document = store.similarity_search("text 3", k=1)[0]
    assert document == Document("text 3", id="id 3", metadata=METADATAS[3])
    assert store.similarity_search("a question", k=2, ef=32, threads=1) != []
    with pytest.raises(TypeError, match="fetch"):
        store.similarity_search("a question", fetch=3)


@pytest.mark.parametrize(
    ("filter", "is_met"),
    [
        ({"lang": "en"}, lambda m: m["lang"] == "en"),
        ({"lang": ["en", "de"]}, lambda m: m["lang"] in ("en", "de")),
        ({"lang": "en", "number": {"$gt": 6}}, lambda m: m["lang"] == "en" and m["number"] > 6),
        ({"number": {"$gte": 3, "$lt": 9}}, lambda m: 3 <= m["number"] < 9),
        ({"number": {"$lte": 3}}, lambda m: m["number"] <= 3),
        ({"number": {"$eq": 3}}, lambda m: m["number"] == 3),
        ({"lang": {"$ne": "en"}}, lambda m: m["lang"] != "en"),
        ({"number": {"$in": [1, 2, "x"]}}, lambda m: m["number"] in (1, 2)),
        ({"number": {"$nin": [1, 2]}}, lambda m: m["number"] not in (1, 2)),
        ({"odd": True}, lambda m: m.get("odd", False)),
        ({"odd": {"$ne": True}}, lambda m: not m.get("odd", False)),
        ({"odd": {"$gt": 0}, "lang": {"$gt": "e"}}, lambda m: "odd" in m and m["lang"] > "e"),
        ({"lang": {"$gt": 3}}, lambda m: False),
        ({"nothing": "x"}, lambda m: False),
        ({"nothing": {"$lt": 3}}, lambda m: False),
        ({}, lambda m: True),
        ({"$or": [{"number": 3}, {"number": 4}]}, lambda m: m["number"] in (3, 4)),
        ({"$and": [{"odd": True}, {"lang": "de"}]}, lambda m: "odd" in m and m["lang"] == "de"),
        ({"$not": {"lang": "en"}, "odd": True}, lambda m: "odd" in m and m["lang"] != "en"),
        (lambda document: document.id == "id 3" or "9" in document.page_content, None),
    ],
)
def test_filters(filter, is_met):
    store = filled()
    if is_met is None:
        expected = {"id 3", "id 9", "id 19", "id 29"}
    else:
        expected = {id for id, metadata in zip(IDS, METADATAS, strict=True) if is_met(metadata)}
    distances = cosine_distances("a question")
    nearest = sorted(expected, key=distances.__getitem__)
    assert ids_of(store.similarity_search("a question", k=30, filter=filter)) == nearest
    assert ids_of(store.similarity_search("a question", k=2, filter=filter)) == nearest[:2]


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ({"number": {"$regex": "x"}}, r"\$regex of 'number', expected one of \$eq, \$ne"),
        ({"number": {"$gt": 1, "lt": 2}}, "lt of 'number'"),
        ({"number": {"$in": "abc"}}, r"\$in of 'number' takes a list, not 'abc'"),
        ({"$or": {"number": 3}}, r"\$or takes a list of dicts"),
        ({"$nor": []}, r"\$nor, expected \$and, \$or, \$not or a key"),
        ({"$not": [3]}, "expected a dict or a function"),
        ("lang = 'en'", "expected a dict or a function"),
    ],
)
def test_filters_that_mean_nothing_are_refused(filter, message):
    with pytest.raises(ValueError, match=message):
        filled().similarity_search("a question", filter=filter)


def test_ids_are_made_where_none_is_given():
    store = HNSWVectorStore(EMBEDDING)
    first = store.add_texts(["a", "b"])
    assert len(set(first)) == 2 and all(isinstance(id, str) for id in first)
    assert store.add_texts(["c", "d"], ids=["x", None])[0] == "x" and len(store) == 4
    assert store.add_texts([]) == []
    vectors = EMBEDDING.embed_documents(["a"])
    assert store.add_embeddings(zip(["other"], vectors, strict=True), ids=[first[0]]) == first[:1]
    assert store.get_by_ids(first)[0].page_content == "other" and len(store) == 4
    for bad in ({"ids": ["x"]}, {"metadatas": [{}]}):
        with pytest.raises(ValueError, match="2 texts"):
            store.add_texts(["a", "b"], **bad)
    assert len(store) == 4


def test_what_is_handed_out_is_not_what_is_kept():
    metadata = {"a": 1}
    store = HNSWVectorStore.from_texts(["a"], EMBEDDING, [metadata], ids=["x"])
    metadata["a"] = 2
    store.get_by_ids(["x"])[0].metadata["a"] = 3
    assert store.get_by_ids(["x"])[0].metadata == {"a": 1}


def test_delete_without_ids_removes_all():
    store = filled()
    assert store.delete() and len(store) == 0 and store.similarity_search("a question") == []


@pytest.mark.parametrize("metric", ["cosine", "l2", "euclidean", "ip"])
def test_relevance_is_between_0_and_1_and_that_of_unit_vectors_by_any_metric(metric):
    """Of angle t: cos t, and 1 - |a - b| / sqrt 2 for the distances."""
    rows = {"same": [1.0, 0.0], "60 degrees": [0.5, 0.75**0.5], "opposite": [-1.0, 0.0]}
    store = HNSWVectorStore.from_embeddings(rows.items(), Fixed(rows), metric=metric)
    found = store.similarity_search_with_relevance_scores("same", k=3)
    assert [document.page_content for document, _ in found] == list(rows)
    middle = 0.5 if metric in ("cosine", "ip") else 1 - 1 / 2**0.5
    assert [relevance for _, relevance in found] == pytest.approx([1, middle, 0], abs=1e-6)
    retriever = store.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.2, "k": 3}
    )
    assert [document.page_content for document in retriever.invoke("same")] == list(rows)[:2]
    store = HNSWVectorStore.from_embeddings(
        rows.items(), Fixed(rows), metric=metric, relevance_score_fn=lambda distance: 0.25
    )
    assert store.similarity_search_with_relevance_scores("same", k=1)[0][1] == 0.25


class Fixed(DeterministicFakeEmbedding):
    """Vectors that were given."""

    rows: dict[str, list[float]]

    def __init__(self, rows):
        super().__init__(size=2, rows=rows)

    def embed_query(self, text):
        return self.rows[text]


def test_marginal_relevance_takes_what_is_unlike_the_first():
    rows = {"q": [1.0, 0.0], "near": [0.99, 0.1], "as near": [0.99, 0.11], "other": [0.7, -0.7]}
    store = HNSWVectorStore.from_embeddings(
        list(rows.items())[1:], Fixed(rows), [{"n": n} for n in range(3)]
    )
    found = store.max_marginal_relevance_search("q", k=2, fetch_k=3, lambda_mult=0.3)
    assert [document.page_content for document in found] == ["near", "other"]
    found = store.max_marginal_relevance_search("q", k=2, fetch_k=2, lambda_mult=0.3)
    assert [document.page_content for document in found] == ["near", "as near"]
    found = store.max_marginal_relevance_search("q", k=2, filter={"n": [1, 2]}, lambda_mult=0.3)
    assert [document.page_content for document in found] == ["as near", "other"]
    retriever = store.as_retriever(
        search_type="mmr", search_kwargs={"k": 2, "fetch_k": 3, "lambda_mult": 0.3}
    )
    assert [document.page_content for document in retriever.invoke("q")] == ["near", "other"]
    assert HNSWVectorStore(EMBEDDING).max_marginal_relevance_search("q") == []


def test_a_folder_keeps_the_store(tmp_path):
    store = filled(metric="l2", dtype="int4")
    store.save_local(tmp_path / "store")
    loaded = HNSWVectorStore.load_local(tmp_path / "store", EMBEDDING, ef=32)
    assert (loaded.ef, loaded.index.dtype, len(loaded)) == (32, "int4", 30)
    for query in TEXTS[:3]:
        asked = {"k": 5, "filter": {"lang": ["en", "fr"]}, "ef": 64}
        expected = store.similarity_search_with_score(query, **asked)
        assert loaded.similarity_search_with_score(query, **asked) == expected
    copy = pickle.loads(pickle.dumps(store))
    assert copy.similarity_search("text 3", k=3) == store.similarity_search("text 3", k=3)


def test_all_of_it_from_a_loop():
    async def work():
        store = await HNSWVectorStore.afrom_documents(
            [Document(text, id=id) for text, id in zip(TEXTS, IDS, strict=True)], EMBEDDING
        )
        found = await asyncio.gather(*[store.asimilarity_search(text, k=1) for text in TEXTS])
        assert [ids_of(documents) for documents in found] == [[id] for id in IDS]
        assert ids_of(await store.as_retriever().ainvoke("text 3"))[0] == "id 3"
        assert len(await store.amax_marginal_relevance_search("text 3", k=2)) == 2

    asyncio.run(work())
