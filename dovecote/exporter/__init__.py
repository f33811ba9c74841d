"""Metrics and health of a process, over HTTP."""
