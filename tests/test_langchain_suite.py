"""LangChain's own tests of vector stores, all of them and as they are."""

import pytest

pytest.importorskip("langchain_tests", reason="they are the package langchain-tests")

from langchain_tests.integration_tests import VectorStoreIntegrationTests

from hnsw_gpu.langchain import HNSWVectorStore


@pytest.mark.anyio
class TestHNSWVectorStore(VectorStoreIntegrationTests):
    anyio_backend = pytest.fixture(lambda self: "asyncio")

    @pytest.fixture
    def vectorstore(self):
        return HNSWVectorStore(self.get_embeddings())
