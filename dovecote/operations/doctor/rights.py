"""Checks of logins without a Dovecote role: their locks, and their right to connect and create."""

from typing import Any

import psycopg

from dovecote.operations.doctor.finding import Finding, ok, warning
from dovecote.store.foreign_locks import QUERY, ForeignLock

_PUBLIC = """
    with given as (
        select d.datname, quote_ident(d.datname) as name, a.privilege_type
        from pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
        where d.datname = current_database() and a.grantee = 0
    )
    select 'may connect to database ' || datname as may, 'revoke connect on database ' || name || ' from public' as cure
    from given where privilege_type = 'CONNECT'
    union all
    select 'may create temporary tables in database ' || datname,
           'revoke temporary on database ' || name || ' from public'
    from given where privilege_type = 'TEMPORARY'
    union all
    select 'may create objects in schema ' || n.nspname,
           'revoke create on schema ' || quote_ident(n.nspname) || ' from public'
    from pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
    where n.nspname in ('public', 'dovecote') and a.grantee = 0 and a.privilege_type = 'CREATE'
    order by 1
"""


def foreign(connection: psycopg.Connection[Any]) -> Finding:
    """Find foreign sessions that hold Dovecote's advisory locks."""
    found = [ForeignLock(*row) for row in connection.execute(QUERY)]
    if not found:
        return ok("locks.foreign", "nobody holds locks of ours that he has no use for")
    cures = "; ".join(dict.fromkeys(lock.cure for lock in found))
    effect = (
        "Every statement on those tables waits"
        if any(lock.purpose == "table" for lock in found)
        else "Writers and relays go on, more slowly"
    )
    advice = (
        f"{effect}. End them: {cures}. Anybody who may connect can take such locks: give "
        "CONNECT to those only who need it, see rights.public."
    )
    return warning("locks.foreign", "; ".join(str(lock) for lock in found), advice)


def public(connection: psycopg.Connection[Any]) -> Finding:
    """What every login may do here."""
    rows = connection.execute(_PUBLIC).fetchall()
    if not rows:
        return ok("rights.public", "nobody may connect, create or make temporary tables without a grant of his own")
    found = "every login " + ", ".join(right for right, _ in rows)
    advice = (
        "; ".join(cure for _, cure in rows)
        + "; grant connect to those who need it first (the logins of writers, relays, consumers and operators)."
    )
    return warning("rights.public", found, advice)
