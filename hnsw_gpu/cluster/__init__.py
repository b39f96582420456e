"""Collections on the machines of a Ray cluster. Needs the extra `ray`."""

from typing import TYPE_CHECKING

from hnsw_gpu.lazy_names import lazy_names

if TYPE_CHECKING:
    from hnsw_gpu.cluster.ray_connection import ray_connection

__all__ = ["ray_connection"]

_HOME = {"ray_connection": "ray_connection"}

__getattr__ = lazy_names(__name__, _HOME)
