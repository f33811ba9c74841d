"""Every operator verb. The command line, and one day the console, call nothing else.

One module a subject; a verb takes an engine, returns a dataclass with `as_json`, and prints nothing.
"""

from dovecote.operations.aggregates import Blocked, BlockedPage, blocked_aggregates
from dovecote.operations.audit import AuditEntry, AuditPage, audit, whoever
from dovecote.operations.deliveries import (
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
from dovecote.operations.events import EventFilter, EventLife, EventPage, NoSuchEvent, event, events
from dovecote.operations.handlers import CannotPause, Handler, Pause, handlers
from dovecote.operations.handlers import pause as pause_handler
from dovecote.operations.handlers import resume as resume_handler
from dovecote.operations.leftovers import HandlerWithoutRoute, handlers_without_route
from dovecote.operations.message_keys import KnownKey, message_keys, revoke_message_key, rotate_message_key
from dovecote.operations.recover import CannotRecover, Recovery, recover
from dovecote.operations.retention import Archived, Maintenance, Partitions, maintain, partitions, require_present
from dovecote.operations.retry import CannotChange, Change, discard, retry
from dovecote.operations.status import HandlerStatus, RelayStatus, Status, status
from dovecote.operations.tail import Followed, follow
from dovecote.operations.validation import BadCursor, NoActor, NoReason, NotPermitted, WrongRequest
from dovecote.store.unrouted import UnroutedType, unrouted

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
