"""Which standbys Postgres has, and how far they have flushed."""

from typing import Any

import psycopg

# Standbys are seen as sessions of walsenders, with the right to see them, or by their slots, which every login sees:
# the restart_lsn of a physical slot is what its standby has confirmed as flushed. A subscriber is no standby,
# nor is a running backup, nor an archive: they cannot be promoted. Their slots would be taken for standbys.
#: Whether a standby has flushed up to here, or up to now; null where none is seen. And what is now.
FLUSHED = """
    select max(flushed) >= coalesce(%(upto)s::pg_lsn, pg_current_wal_insert_lsn()) as is_flushed,
           pg_current_wal_insert_lsn()::text as now
    from (
        select r.flush_lsn as flushed from pg_stat_replication r
        where r.state = 'streaming' and r.application_name not in ('pg_basebackup', 'pg_receivewal')
          and not exists (select from pg_replication_slots s where s.active_pid = r.pid and s.slot_type = 'logical')
        union all
        select s.restart_lsn from pg_replication_slots s
        where s.slot_type = 'physical' and s.active and not s.temporary
    ) as standby
"""
_CAN_SEE = """
    select pg_has_role(current_user, 'pg_read_all_stats', 'usage')
        or exists (select from pg_replication_slots where slot_type = 'physical' and not temporary), current_user::text
"""


def blindness(connection: psycopg.Connection[Any]) -> str | None:
    """Return what to do so that a standby can be seen by this login; None where one could be."""
    can_see, login = connection.execute(_CAN_SEE).fetchone() or (False, "")
    if can_see:
        return None
    return f"grant pg_read_all_stats to {login}, or give the standby a physical slot (primary_slot_name)"
