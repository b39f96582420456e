"""An example of the whole engine on real text: what `hnsw-gpu demo` runs."""

from hnsw_gpu.demo.walkthrough import run_demo

__all__ = ["run_demo"]
