"""Names for annotations."""

from hpc_ray.client.refs import ObjectRef

__all__ = ["ObjectRef"]
