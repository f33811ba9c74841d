"""The library's tables: all SQL on a table is in its module here, or in a function of the database."""
