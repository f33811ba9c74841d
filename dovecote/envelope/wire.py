"""The wire format, in one place: where things are in an envelope and in a message.

An envelope is CloudEvents JSON that SQL writes as text (`dovecote.envelope`, `dovecote.small_envelope`). The relay
never parses it: it takes the event's id from its fixed place, and puts envelopes into a message of Dramatiq's, one a
line, with a template. Lua reads the handler from the beginning of a message (lua/move.lua).
tests/dovecote/envelope/test_wire.py holds SQL, Python and Lua against each other.
"""

import re
import time
from collections.abc import Mapping, Sequence
from uuid import UUID

# The envelope ------------------------------------------------------------------------------------

_BEFORE_ID = b'{"specversion":"1.0","id":"'
#: Where the event's id is in an envelope.
EVENT_ID = slice(len(_BEFORE_ID), len(_BEFORE_ID) + 36)
#: The same as a pattern, for a line that may be no envelope.
EVENT_ID_PATTERN = re.compile(
    re.escape(_BEFORE_ID) + rb'([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"'
)
#: The ids of all events in a message, also one that no relay made.
EVENT_IDS_PATTERN = re.compile(re.escape(_BEFORE_ID[1:]) + rb'([0-9a-f-]{36})"')

#: Of the attributes: everything behind the first group comes from headers, which a writer chooses.
HEADERS_PATTERN = re.compile(rb'(,"position":"\d+").*', re.DOTALL)

#: The payload comes last, behind this. A quote within a text is escaped, so that no attribute contains it.
BEFORE_DATA = b',"data":'

#: A quote within a text is escaped, and the payload has a blank after each comma: nothing else in an envelope reads
#: like this. It is found no earlier and no later than this.
TRACEPARENT = b',"traceparent":"00-'
TRACEPARENT_FROM, TRACEPARENT_TO = 150, 2_500
#: From there on: where the last digit of the trace flags is.
TRACE_FLAG_AT = len(TRACEPARENT) + 32 + len("-") + 16 + len("-0")

# The message -------------------------------------------------------------------------------------

#: What a message must have, and of which type: Dramatiq's worker and its Redis broker rely on it.
FIELDS: Mapping[str, type] = {
    "queue_name": str,
    "actor_name": str,
    "args": list,
    "kwargs": dict,
    "options": dict,
    "message_id": str,
    "message_timestamp": int,
}

#: The first line of a bundle: queue and handler.
HEAD_PATTERN = re.compile(rb'{"queue_name":"([^"\\\n]{1,255})","actor_name":"([\w.:-]{1,200})","args":\[\[(?=\n|\Z)')

#: What an unsigned message ends with; the signature goes in front of it, as the last of its options.
END = b"}}"
BEFORE_SIGNATURE, AFTER_SIGNATURE = b',"signature":"', b'"' + END
KEY_ID_BYTES, DIGEST_BYTES = 16, 64
#: Bytes at the end of a signed message that the signature does not cover: itself.
TAIL_BYTES = len(BEFORE_SIGNATURE) + KEY_ID_BYTES + DIGEST_BYTES + len(AFTER_SIGNATURE)


def unsigned_message(
    queue: str,
    handler: str,
    message_id: str,
    envelopes: Sequence[bytes],
    *,
    retry: bool = False,
    replay: UUID | None = None,
    sent_in: str | None = None,
) -> bytes:
    """Return a message of Dramatiq's with these envelopes, up to but not including END or a signature.

    One envelope a line: a message that cannot be read as a whole is read line by line. The names are ours and need no
    escaping. `sent_in` is in the options, where consumers ignore what they do not know.
    """
    its_replay = "" if replay is None else f',"replay":"{replay}"'
    its_run = "" if sent_in is None else f',"sent_in":"{sent_in}"'
    return b"".join(
        (
            f'{{"queue_name":"{queue}","actor_name":"{handler}","args":[[\n'.encode(),
            b",\n".join(envelopes),
            f'\n]],"kwargs":{{"retry":{str(retry).lower()}{its_replay}}},"message_id":"{message_id}",'
            f'"message_timestamp":{time.time_ns() // 1_000_000},'
            f'"options":{{"redis_message_id":"{message_id}"{its_run}'.encode(),
        )
    )


def event_ids_of_first_delivery(message: bytes) -> list[bytes]:
    """Return the ids of the events in a bundle; none in a retry or a replay.

    A retry acts on nothing but deliveries, and a replay on nothing but processed events: an event that is neither gets
    to its handler with neither.
    """
    *lines, tail = message.split(b"\n")
    if b'"retry":true' in tail or b'"replay":' in tail:
        return []
    return [line[EVENT_ID] for line in lines[1:]]
