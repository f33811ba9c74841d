-- Back to the function of 0012. Relays of before ask for horizon().

create or replace function dovecote.announce() returns trigger
language plpgsql as $$
-- "Whatever I insert lies above this floor": taken before the first position of the transaction, held
-- until its end. Once a transaction is enough: its first floor is its lowest. A rollback to a savepoint
-- gives back lock and setting together.
declare
    announced text;
begin
    if current_setting('dovecote.announced', true) is distinct from pg_current_xact_id()::text then
        if not pg_try_advisory_xact_lock_shared(
                dovecote.floor_key(coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0))) then
            raise exception 'somebody holds a floor of the outbox exclusively, which nobody may';
        end if;
        -- An assignment: perform would be a query.
        announced := set_config('dovecote.announced', pg_current_xact_id()::text, true);
        -- The bell rings only for a relay that sleeps: it then holds this key for itself.
        if not pg_try_advisory_xact_lock_shared(dovecote.bell_key()) then
            perform pg_notify('dovecote_outbox', '');
        end if;
    end if;
    return null;
end $$;

drop function dovecote.writers_at_work;
