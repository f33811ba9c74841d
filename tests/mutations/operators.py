"""Lines that guard what operators do: the database counts it, writes it down, and refuses the rest."""

from tests.mutations.mutant import Mutant
from tests.mutations.sql_files import DELIVERIES_SQL, OPERATORS_SQL, REPLAYS_SQL

VERBS = "tests/security/test_operators.py"
FILTERS = "tests/security/test_operators_filters.py"
GRANTS = "tests/security/test_grants.py"

OPERATORS = (
    Mutant(
        "a pause leaves no line",
        OPERATORS_SQL,
        "    perform dovecote.write_audit_line(actor, 'handlers.pause'",
        "    perform jsonb_build_array(actor, 'handlers.pause'",
        VERBS,
    ),
    Mutant(
        "a retry leaves no line",
        OPERATORS_SQL,
        "    perform dovecote.write_audit_line(\n        actor, 'deliveries.' || verb, reason, affected,",
        "    perform jsonb_build_array(\n        actor, 'deliveries.' || verb, reason, affected,",
        VERBS,
    ),
    Mutant(
        "a cancelled replay leaves no line",
        REPLAYS_SQL,
        "    perform dovecote.write_audit_line(actor, 'replay.' || verb",
        "    perform jsonb_build_array(actor, 'replay.' || verb",
        VERBS,
    ),
    Mutant(
        "the login is what the actor says",
        OPERATORS_SQL,
        "    insert into dovecote.audit_log (actor, action, reason, affected, details)\n"
        "    values (actor, action, reason, affected, details);",
        "    insert into dovecote.audit_log (actor, login, action, reason, affected, details)\n"
        "    values (actor, actor, action, reason, affected, details);",
        VERBS,
    ),
    Mutant(
        "a worker writes lines of operators",
        OPERATORS_SQL,
        "    if not pg_has_role(current_user, 'dovecote_owner', 'usage')\n",
        "    if false and not pg_has_role(current_user, 'dovecote_owner', 'usage')\n",
        VERBS,
    ),
    Mutant(
        "a worker's functions write lines in another's name",
        OPERATORS_SQL,
        "        new.actor := session_user;\n",
        "        null;\n",
        VERBS,
    ),
    Mutant(
        "a name may hold escape sequences",
        OPERATORS_SQL,
        "length(new.actor) > 200 or new.actor ~ '[",
        "length(new.actor) > 200 or new.actor ~ 'no[",
        FILTERS,
    ),
    Mutant(
        "a null in a filter asks for everything",
        OPERATORS_SQL,
        "when 'string' then jsonb_typeof(one.value) = 'string'\n",
        "when 'string' then jsonb_typeof(one.value) in ('string', 'null')\n",
        FILTERS,
    ),
    Mutant(
        "an unknown key of a filter is passed over",
        OPERATORS_SQL,
        "        if kind is null then\n",
        "        if false then\n",
        FILTERS,
    ),
    Mutant(
        "what waits is discarded of a handler that has a route",
        OPERATORS_SQL,
        "if not filter ? 'handler' or dovecote.is_routed(filter ->> 'handler') then",
        "if not filter ? 'handler' then",
        VERBS,
    ),
    Mutant(
        "a handler that has a route is forgotten",
        OPERATORS_SQL,
        "    if dovecote.is_routed(handler) then\n",
        "    if false then\n",
        VERBS,
    ),
    Mutant(
        "whether a handler may act again is left to the client",
        REPLAYS_SQL,
        "where s.handler_name = handler and not s.replayable) then",
        "where s.handler_name = handler and false) then",
        VERBS,
    ),
    Mutant(
        "a batch is as large as one likes",
        OPERATORS_SQL,
        "most not between 1 and 5000 then",
        "most < 1 then",
        FILTERS,
    ),
    Mutant(
        "an operator still has the table",
        DELIVERIES_SQL,
        "grant select, delete on dovecote.deliveries to dovecote_worker;\n",
        "grant select, delete on dovecote.deliveries to dovecote_worker;\n"
        "grant insert, update, delete on dovecote.deliveries to dovecote_operator;\n",
        f"{VERBS} {GRANTS}",
    ),
    Mutant(
        "the relay does not tell what a route allows",
        "dovecote/store/subscriptions.py",
        "    set routed_epoch = excluded.routed_epoch, replayable = excluded.replayable, ordered = excluded.ordered\n",
        "    set routed_epoch = excluded.routed_epoch\n",
        "tests/dovecote/relay/test_routing.py",
    ),
)
