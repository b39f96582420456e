"""Graphs of other libraries: read as they are, checked, and written."""

from hnsw_gpu.peers.faiss_graph import faiss_index, read_faiss, write_faiss
from hnsw_gpu.peers.hnswlib_file import read_hnswlib, write_hnswlib
from hnsw_gpu.peers.outgoing_graph import outgoing
from hnsw_gpu.peers.peer_graph import PeerGraph, graph_of
from hnsw_gpu.peers.usearch_file import read_usearch

__all__ = [
    "PeerGraph",
    "faiss_index",
    "graph_of",
    "outgoing",
    "read_faiss",
    "read_hnswlib",
    "read_usearch",
    "write_faiss",
    "write_hnswlib",
]
