"""What is true and what happened. Importable alone by any service; it never imports `workers`."""
