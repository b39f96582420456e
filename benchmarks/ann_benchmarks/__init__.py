"""What ann-benchmarks takes: this folder, as its `ann_benchmarks/algorithms/hnsw_gpu`."""
