"""Every operator verb. The command line, and one day the console, call nothing else.

One module a subject; a verb takes an engine, returns a dataclass with `as_json`, and prints nothing.
"""

from workers.operations.aggregates import Blocked, BlockedPage, blocked_aggregates
from workers.operations.asking import BadCursor, NoActor, NoReason, NotPermitted, WrongRequest
from workers.operations.audit import AuditEntry, AuditPage, audit, whoever
from workers.operations.counting import Counted, count_everything
from workers.operations.events import EventFilter, EventLife, EventPage, NoSuchEvent, event, events
from workers.operations.failures import (
    Failure,
    FailurePage,
    Filter,
    Group,
    Groups,
    NotThere,
    Story,
    failure,
    failure_groups,
    failures,
)
from workers.operations.following import Followed, follow
from workers.operations.handlers import CannotPause, Handler, Pause, handlers
from workers.operations.handlers import pause as pause_handler
from workers.operations.handlers import resume as resume_handler
from workers.operations.leftovers import HandlerWithoutRoute, handlers_without_route
from workers.operations.message_keys import KnownKey, message_keys, revoke_message_key, rotate_message_key
from workers.operations.recovering import CannotRecover, Recovery, recover
from workers.operations.remedies import CannotChange, Change, discard, retry
from workers.operations.retention import Archived, Maintenance, Partitions, maintain, partitions, require_present
from workers.operations.status import HandlerStatus, RelayStatus, Status, status
from workers.operations.unrouted import UnroutedType, unrouted

__all__ = [
    "Archived",
    "AuditEntry",
    "AuditPage",
    "BadCursor",
    "Blocked",
    "BlockedPage",
    "CannotChange",
    "CannotPause",
    "CannotRecover",
    "Change",
    "Counted",
    "EventFilter",
    "EventLife",
    "EventPage",
    "Failure",
    "FailurePage",
    "Filter",
    "Followed",
    "Group",
    "Groups",
    "Handler",
    "HandlerStatus",
    "HandlerWithoutRoute",
    "KnownKey",
    "Maintenance",
    "NoActor",
    "NoReason",
    "NoSuchEvent",
    "NotPermitted",
    "NotThere",
    "Partitions",
    "Pause",
    "Recovery",
    "RelayStatus",
    "Status",
    "Story",
    "UnroutedType",
    "WrongRequest",
    "audit",
    "blocked_aggregates",
    "count_everything",
    "discard",
    "event",
    "events",
    "failure",
    "failure_groups",
    "failures",
    "follow",
    "handlers",
    "handlers_without_route",
    "maintain",
    "message_keys",
    "partitions",
    "pause_handler",
    "recover",
    "require_present",
    "resume_handler",
    "retry",
    "revoke_message_key",
    "rotate_message_key",
    "status",
    "unrouted",
    "whoever",
]
