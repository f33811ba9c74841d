"""Lines that guard what operators do: the database counts it, writes it down, and refuses the rest."""

from tests.mutations.mutant import Mutant

VERBS = "tests/security/test_operators.py"
FILTERS = "tests/security/test_operators_filters.py"
GRANTS = "tests/security/test_grants.py"
AUDIT_SQL = "migrations/sql/0029_operators_audit.up.sql"
DELIVERIES_SQL = "migrations/sql/0029_operators_deliveries.up.sql"
REPLAYS_SQL = "migrations/sql/0029_operators_replays.up.sql"
RIGHTS_SQL = "migrations/sql/0029_operators_rights.up.sql"

OPERATORS = (
    Mutant(
        "a pause leaves no line",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "    perform dovecote.write_audit_line(actor, 'handlers.pause'",
        "    perform jsonb_build_array(actor, 'handlers.pause'",
        f"{VERBS}::test_a_verb_and_its_line_are_one",
    ),
    Mutant(
        "a retry leaves no line",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "    perform dovecote.write_audit_line(\n        actor, 'deliveries.' || verb, reason, affected,",
        "    perform jsonb_build_array(\n        actor, 'deliveries.' || verb, reason, affected,",
        f"{VERBS}::test_a_verb_and_its_line_are_one[retry]",
    ),
    Mutant(
        "a cancelled replay leaves no line",
        "dovecote/migrations/sql/0008_replays.up.sql",
        "    perform dovecote.write_audit_line(actor, 'replay.' || verb",
        "    perform jsonb_build_array(actor, 'replay.' || verb",
        f"{VERBS}::test_a_verb_and_its_line_are_one[pause a replay]",
    ),
    Mutant(
        "the login is what the actor says",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "    insert into dovecote.audit_log (actor, action, reason, affected, details)\n"
        "    values (actor, action, reason, affected, details);",
        "    insert into dovecote.audit_log (actor, login, action, reason, affected, details)\n"
        "    values (actor, actor, action, reason, affected, details);",
        f"{VERBS}::test_the_login_is_that_of_the_session[dovecote_operator]",
    ),
    Mutant(
        "a worker writes lines of operators",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "    if not pg_has_role(current_user, 'dovecote_owner', 'usage')\n",
        "    if false and not pg_has_role(current_user, 'dovecote_owner', 'usage')\n",
        f"{VERBS}::test_a_worker_writes_the_relay_s_lines_and_nobody_else_s",
    ),
    Mutant(
        "a worker's functions write lines in another's name",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "        new.actor := session_user;\n",
        "        null;\n",
        f"{VERBS}::test_a_line_by_a_worker_is_never_in_somebody_else_s_name",
    ),
    Mutant(
        "a name may hold escape sequences",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "length(new.actor) > 200 or new.actor ~ '[",
        "length(new.actor) > 200 or new.actor ~ 'no[",
        f"{FILTERS}::test_a_line_has_a_name_of_somebody_and_no_more_than_a_screen_takes[retry]",
    ),
    Mutant(
        "a null in a filter asks for everything",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "when 'string' then jsonb_typeof(one.value) = 'string'\n",
        "when 'string' then jsonb_typeof(one.value) in ('string', 'null')\n",
        f"{FILTERS}::test_a_filter_that_is_none_is_refused_in_words[retry-filter7-handler must be a text, not null]",
    ),
    Mutant(
        "an unknown key of a filter is passed over",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "        if kind is null then\n",
        "        if false then\n",
        f"{FILTERS}::test_a_filter_that_is_none_is_refused_in_words",
    ),
    Mutant(
        "what waits is discarded of a handler that has a route",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "if not filter ? 'handler' or dovecote.is_routed(filter ->> 'handler') then",
        "if not filter ? 'handler' then",
        f"{VERBS}::test_a_handler_that_has_a_route_is_not_treated_as_one_without",
    ),
    Mutant(
        "a handler that has a route is forgotten",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "    if dovecote.is_routed(handler) then\n",
        "    if false then\n",
        f"{VERBS}::test_a_handler_that_has_a_route_is_not_treated_as_one_without",
    ),
    Mutant(
        "whether a handler may act again is left to the client",
        "dovecote/migrations/sql/0008_replays.up.sql",
        "where s.handler_name = handler and not s.replayable) then",
        "where s.handler_name = handler and false) then",
        f"{VERBS}::test_what_must_not_act_again_does_not_whatever_the_client_says",
    ),
    Mutant(
        "a batch is as large as one likes",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "most not between 1 and 5000 then",
        "most < 1 then",
        f"{FILTERS}::test_a_batch_has_its_bounds",
    ),
    Mutant(
        "an operator still has the table",
        "dovecote/migrations/sql/0004_deliveries.up.sql",
        "grant select, delete on dovecote.deliveries to dovecote_worker;\n",
        "grant select, delete on dovecote.deliveries to dovecote_worker;\n"
        "grant insert, update, delete on dovecote.deliveries to dovecote_operator;\n",
        f"{VERBS}::test_an_operator_has_no_other_way",
    ),
    Mutant(
        "the relay does not record what a route allows",
        "dovecote/store/subscriptions.py",
        "    set routed_epoch = excluded.routed_epoch, replayable = excluded.replayable, ordered = excluded.ordered\n",
        "    set routed_epoch = excluded.routed_epoch\n",
        "tests/dovecote/relay/test_routing.py::test_what_a_route_allows_is_known_to_the_database_from_each_deploy_on",
    ),
)
