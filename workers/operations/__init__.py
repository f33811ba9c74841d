"""Every operator verb. The command line, and one day the console, call nothing else.

One module a subject; a verb takes an engine, returns a dataclass with `as_json`, and prints nothing.
"""

from workers.operations.audit import AuditEntry, AuditPage, NoReason, audit, record, whoever
from workers.operations.counting import Counted, count_everything
from workers.operations.retention import Archived, Maintenance, Partitions, maintain, partitions, require_present
from workers.operations.status import HandlerStatus, Pause, RelayStatus, Status, status
from workers.operations.unrouted import UnroutedType, unrouted

__all__ = [
    "Archived",
    "AuditEntry",
    "AuditPage",
    "Counted",
    "HandlerStatus",
    "Maintenance",
    "NoReason",
    "Partitions",
    "Pause",
    "RelayStatus",
    "Status",
    "UnroutedType",
    "audit",
    "count_everything",
    "maintain",
    "partitions",
    "record",
    "require_present",
    "status",
    "unrouted",
    "whoever",
]
