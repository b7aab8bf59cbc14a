"""What runtime environments are made of: packages of files, and virtual environments. Relied on by whoever gives them (the public
API) and by the worker that makes them. The key-value table is reached through an ``ask`` that is handed in."""
