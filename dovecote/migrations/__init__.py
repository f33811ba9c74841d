"""The library's tables, and what brings a database to them. Needs Alembic, SQLAlchemy and psycopg only."""
