"""The GCS: one per session, keeps nodes, jobs, actors, placement groups and keys."""
