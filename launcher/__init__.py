"""How a cluster starts: roles, the fork server, the command line, host and resource discovery."""
