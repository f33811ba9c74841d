"""Dramatiq's Redis broker with what we add to it: publishing for the relay, fetching for consumers."""
