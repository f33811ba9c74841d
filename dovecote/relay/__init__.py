"""Move committed events from the outbox to the queues."""
