"""The handlers: one function for one kind of event, one module for each slice."""
