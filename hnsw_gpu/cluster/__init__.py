"""A collection on the machines of a Ray cluster. Needs the extra `ray`, once it is used."""

from typing import TYPE_CHECKING

from hnsw_gpu.lazy_names import lazy_names

if TYPE_CHECKING:
    from hnsw_gpu.cluster.cluster import Cluster
    from hnsw_gpu.cluster.job_steps import steps_on_ray
    from hnsw_gpu.cluster.shard_calls import ShardLostError

__all__ = ["Cluster", "ShardLostError", "steps_on_ray"]

_HOME = {"Cluster": "cluster", "ShardLostError": "shard_calls", "steps_on_ray": "job_steps"}

__getattr__ = lazy_names(__name__, _HOME)
