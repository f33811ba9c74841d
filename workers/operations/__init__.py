"""Every operator verb. The command line, and one day the console, call nothing else.

One module a subject; a verb takes an engine, returns a dataclass with `as_json`, and prints nothing.
"""

from workers.operations.status import HandlerStatus, RelayStatus, Status, status

__all__ = ["HandlerStatus", "RelayStatus", "Status", "status"]
