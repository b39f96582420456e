"""hnsw_gpu.llama_index: what LlamaIndex asks of a vector store, beside its own simple one."""

import asyncio
import math
import pickle
import re

import pytest

pytest.importorskip("llama_index.core", reason="LlamaIndex comes with the extra `llama-index`")

from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.schema import (
    Document,
    ImageNode,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from hnsw_gpu.llama_index import HNSWVectorStore

PETS = [  # id, document, embedding, metadata
    ("cat", "farm", [1.0, 0.1], {"legs": 4, "size": 0.3, "says": "meow", "eats": ["mice", "fish"]}),
    ("dog", "farm", [0.9, 0.4], {"legs": 4, "size": 0.7, "says": "woof", "eats": ["meat"]}),
    ("hen", "coop", [0.1, 1.0], {"legs": 2, "size": 0.4, "says": "cluck", "eats": ["corn"]}),
    ("fly", None, [-1.0, 0.2], {"legs": 6, "size": 0.01, "says": "Meow!", "eats": []}),
]
IDS = [pet[0] for pet in PETS]


def nodes():
    return [
        TextNode(
            id_=id, text=f"This is a {id}.", embedding=embedding, metadata=dict(metadata),
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)}
            if document
            else {},
        )
        for id, document, embedding, metadata in PETS
    ]  # fmt: skip


def filled(**options):
    store = HNSWVectorStore(**options)
    assert store.add(nodes()) == IDS
    return store


def found(store, embedding=(1.0, 0.0), k=4, **asked):
    how = {name: asked.pop(name) for name in list(asked) if name in ("mmr_threshold", "ef")}
    query = VectorStoreQuery(query_embedding=list(embedding), similarity_top_k=k, **asked)
    return store.query(query, **how)


def one(key, operator, value):
    return MetadataFilters(filters=[MetadataFilter(key=key, operator=operator, value=value)])


def test_it_is_a_vector_store_that_keeps_texts():
    assert BasePydanticVectorStore in HNSWVectorStore.__mro__
    store = HNSWVectorStore()
    assert store.stores_text and store.is_embedding_query and store.client is None
    assert (HNSWVectorStore.class_name(), filled().client.dim) == ("HNSWVectorStore", 2)


@pytest.mark.parametrize("embedding", [(1.0, 0.0), (0.2, 1.0), (-1.0, -0.9)])
def test_queries_answer_as_the_simple_store(embedding):
    simple = SimpleVectorStore()
    simple.add(nodes())
    for k in (1, 2, 9):
        ours, theirs = found(filled(), embedding, k), found(simple, embedding, k)
        assert ours.ids == theirs.ids
        assert ours.similarities == pytest.approx(theirs.similarities, abs=1e-6)
        assert [node.node_id for node in ours.nodes] == ours.ids


def test_similarities_fall_whatever_the_metric():
    expected = {
        "ip": [1.0, 0.9, 0.1, -1.0],
        "l2": [-0.01, -0.17, -1.81, -4.04],
        "euclidean": [-0.1, -(0.17**0.5), -(1.81**0.5), -(4.04**0.5)],
    }
    for metric, similarities in expected.items():
        result = found(filled(metric=metric))
        assert result.ids == IDS
        assert result.similarities == pytest.approx(similarities, abs=1e-5)


OPERATORS = [
    ("legs", "==", 4), ("legs", "!=", 4), ("legs", ">", 2), ("legs", ">=", 4), ("legs", "<", 4),
    ("legs", "<=", 4), ("size", ">", 0.35), ("says", "in", ["woof", "cluck"]),
    ("says", "nin", ["woof", "cluck"]), ("eats", "contains", "fish"),
    ("eats", "any", ["fish", "corn"]), ("eats", "all", ["fish", "mice"]),
    ("says", "text_match", "eow"),
    ("says", "text_match_insensitive", "MEOW"), ("eats", "is_empty", None),
    ("no such key", "==", "x"), ("no such key", "is_empty", None), ("doc_id", "==", "coop"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "operator", "value"), OPERATORS)
def test_filters_mean_what_they_mean_to_the_simple_store(key, operator, value):
    simple = SimpleVectorStore()
    simple.add(nodes())
    filters = one(key, FilterOperator(operator), value)
    ours = found(filled(), filters=filters).ids
    assert ours == found(simple, filters=filters).ids
    assert len(ours) < len(IDS) or operator == "is_empty"
    assert [node.node_id for node in filled().get_nodes(filters=filters)] == [
        id for id in IDS if id in ours
    ]


@pytest.mark.parametrize(("operator", "value"), [("in", 5), (">", [1]), (">", 3)])
def test_a_filter_that_suits_no_value_is_named(operator, value):
    words = re.escape(f"filter: 'says' {operator} {value!r}, and there is '")
    with pytest.raises(ValueError, match=words):
        found(filled(), filters=one("says", FilterOperator(operator), value))


def test_conditions_of_filters():
    parts = [
        MetadataFilter(key="legs", value=4),
        MetadataFilter(key="says", value="meow"),
    ]
    store = filled()
    for condition, expected in [
        (FilterCondition.AND, ["cat"]),
        (FilterCondition.OR, ["cat", "dog"]),
        (FilterCondition.NOT, ["hen", "fly"]),
    ]:
        filters = MetadataFilters(filters=parts, condition=condition)
        assert found(store, filters=filters).ids == expected
    inner = MetadataFilters(filters=parts, condition=FilterCondition.OR)
    outer = MetadataFilters(filters=[inner, MetadataFilter(key="size", operator=">", value=0.5)])
    assert found(store, filters=outer).ids == ["dog"]
    outer = MetadataFilters(filters=[inner], condition=FilterCondition.NOT)
    assert found(store, filters=outer).ids == ["hen", "fly"]
    assert found(store, filters=MetadataFilters(filters=[])).ids == IDS


def test_a_query_may_name_nodes_and_documents():
    store = filled()
    assert found(store, node_ids=["fly", "hen", "no such"]).ids == ["hen", "fly"]
    assert found(store, doc_ids=["farm"]).ids == ["cat", "dog"]
    assert found(store, doc_ids=["farm"], node_ids=["dog", "hen"]).ids == ["dog"]
    assert found(store, node_ids=["dog", "hen"], filters=one("legs", "==", 2)).ids == ["hen"]
    assert found(store, doc_ids=[]).ids == []
    assert found(store, node_ids=[]).ids == IDS  # what retrievers of an index give that names none


def test_other_modes():
    store = filled()
    result = found(store, k=2, mode=VectorStoreQueryMode.MMR, mmr_threshold=0.1)
    assert result.ids == ["cat", "fly"]  # as unlike the first as can be
    assert found(store, k=2, mode=VectorStoreQueryMode.MMR, mmr_threshold=1.0).ids == IDS[:2]
    assert found(HNSWVectorStore(), mode=VectorStoreQueryMode.MMR).ids == []
    with pytest.raises(ValueError, match=r'mode \'sparse\', expected "default" or "mmr"'):
        found(store, mode=VectorStoreQueryMode.SPARSE)
    with pytest.raises(ValueError, match="no query_embedding"):
        store.query(VectorStoreQuery(query_str="cats"))


def test_a_recall_takes_the_place_of_the_stores_ef():
    store = filled()
    store.ef = 200
    tuned = store.client.tune(0.9, k=2, queries=[[1.0, 0.0]])
    query = VectorStoreQuery(query_embedding=[1.0, 0.2], similarity_top_k=2)
    assert store.query(query, recall=0.9).ids == store.query(query, ef=tuned.ef).ids


def test_deletes():
    store = filled()
    with pytest.raises(TypeError, match="ids: 'cat', expected a list of strings"):
        store.delete_nodes("cat")
    store.delete("farm")
    store.delete("no such")
    assert found(store).ids == ["hen", "fly"]
    store = filled()
    store.delete_nodes(["cat", "hen"], one("legs", "==", 4))
    assert found(store).ids == ["dog", "hen", "fly"]
    store.delete_nodes(filters=one("legs", ">", 2))
    assert found(store).ids == ["hen"]
    store.clear()
    assert found(store).ids == [] and store.get_nodes() == []
    store.add([TextNode(id_="wide", text="of another dim", embedding=[1.0, 2.0, 3.0])])
    assert found(store, [1.0, 2.0, 3.0]).ids == ["wide"]


def test_a_node_that_is_here_is_replaced():
    store = filled()
    store.add([TextNode(id_="cat", text="a new one", embedding=[-1.0, 0.0])])
    assert found(store).ids == ["dog", "hen", "fly", "cat"]
    assert store.get_nodes(["cat"])[0].get_content() == "a new one"


def test_nodes_come_back_whole():
    image = ImageNode(
        id_="image", text="a picture", image="AAAA", embedding=[0.0, 1.0], metadata={"a": [1, {}]}
    )
    store = filled()
    store.add([image])
    for given in [*nodes(), image]:
        kept = store.get_nodes([given.node_id])[0]
        assert type(kept) is type(given) and kept.embedding is None
        assert kept.model_copy(update={"embedding": given.embedding}) == given
    assert [node.node_id for node in store.get_nodes(["hen", "no such", "cat"])] == ["hen", "cat"]
    with pytest.raises(ValueError, match="embedding not set"):
        store.add([TextNode(text="without")])


def test_persisting(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store = filled(dtype="int8", metric="l2")
    memory = fsspec.filesystem("memory")
    for path, fs in [
        (str(tmp_path / "a"), None),
        (str(tmp_path / "b"), fsspec.filesystem("file")),
        ("/stores/c", memory),
    ]:
        store.persist(path, fs)
        loaded = HNSWVectorStore.from_persist_path(path, fs, ef=32)
        assert (loaded.ef, loaded.client.dtype) == (32, "int8")
        assert found(loaded, ef=64) == found(store)
    assert memory.cat("/stores/c/documents.jsonl").count(b"This is a cat.") == 1
    copy = pickle.loads(pickle.dumps(store))
    assert found(copy) == found(store)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_index_of_llama_index_over_it(tmp_path, is_async):
    embedding = CountingEmbedding()
    texts = [Document(text=f"number {n}", id_=f"doc {n}", metadata={"n": n}) for n in range(6)]
    storage = StorageContext.from_defaults(vector_store=HNSWVectorStore())
    index = VectorStoreIndex.from_documents(texts, storage_context=storage, embed_model=embedding)
    index.storage_context.persist(str(tmp_path))
    index.delete_ref_doc("doc 3")
    filters = one("n", FilterOperator.LT, 5)
    retriever = index.as_retriever(similarity_top_k=2, filters=filters)
    hits = (
        asyncio.run(retriever.aretrieve("number 3")) if is_async else retriever.retrieve("number 3")
    )
    assert [hit.node.get_content() for hit in hits] == ["number 4", "number 2"]

    store = HNSWVectorStore.from_persist_dir(str(tmp_path))  # where number 3 still is
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding)
    hit = index.as_retriever(similarity_top_k=1).retrieve("number 3")[0]
    assert (hit.node.get_content(), hit.node.ref_doc_id) == ("number 3", "doc 3")
    assert hit.score == pytest.approx(1, abs=1e-6)


class CountingEmbedding(MockEmbedding):
    """The number in a text, as an angle; a little off, so that no two are as near as each other."""

    def __init__(self):
        super().__init__(embed_dim=2)

    def _get_text_embedding(self, text):
        angle = 0.2 * float(re.search(r"number (\d+)", text)[1]) ** 0.99
        return [math.cos(angle), math.sin(angle)]

    def _get_query_embedding(self, query):
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)
