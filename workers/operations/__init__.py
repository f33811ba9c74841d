"""Every operator verb. The command line, and one day the console, call nothing else.

One module a subject; a verb takes an engine, returns a dataclass with `as_json`, and prints nothing.
"""

from workers.operations.retention import Archived, Maintenance, Partitions, maintain, partitions, require_present
from workers.operations.status import HandlerStatus, RelayStatus, Status, status

__all__ = [
    "Archived",
    "HandlerStatus",
    "Maintenance",
    "Partitions",
    "RelayStatus",
    "Status",
    "maintain",
    "partitions",
    "require_present",
    "status",
]
