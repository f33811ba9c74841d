"""What goes wrong outside of us."""


class GatewayUnavailable(Exception):
    """The outside world does not answer for the moment: try again, with growing pauses."""
