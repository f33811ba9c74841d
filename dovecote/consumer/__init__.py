"""Act on the events of a message, once: the consumers' side of the queue."""
