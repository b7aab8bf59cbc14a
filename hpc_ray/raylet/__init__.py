"""The raylet: one per node, keeps its resources, workers, leases and copies of objects."""
