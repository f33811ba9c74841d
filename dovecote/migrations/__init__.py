"""The library's tables, views, functions and roles, and how a database gets them."""
