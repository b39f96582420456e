"""`python -m hnsw_gpu`: the command line."""

from hnsw_gpu.cli import main

main(prog_name="hnsw-gpu")
