"""A small web page on a session, its lists as JSON, and its metrics for Prometheus. Read only; needs the extra ``dashboard``."""
