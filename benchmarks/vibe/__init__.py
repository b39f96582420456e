"""What VIBE takes: this folder, as its `vibe/algorithms/hnsw_gpu`."""
