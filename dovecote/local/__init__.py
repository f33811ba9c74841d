"""A developer's machine: a Postgres and a Redis of our own, and the processes of a Procfile beside them."""
