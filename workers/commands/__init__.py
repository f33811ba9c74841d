"""The commands that this application adds to `dovecote`."""
