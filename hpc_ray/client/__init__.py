"""The client: how any process of a session, driver or worker, submits tasks, calls actors and holds objects."""
