"""What goes wrong outside of us."""

from dovecote.errors import DovecoteError


class GatewayUnavailable(Exception):
    """The outside world does not answer for the moment: try again, with growing pauses."""


class NoKeys(DovecoteError):
    """A handler wants keys in a process that was given none. Its route does not say that it needs them."""
