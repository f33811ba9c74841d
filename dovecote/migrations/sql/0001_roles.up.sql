-- Six roles without a login of their own: grant them to the logins of your services and operators.
--
--   dovecote_owner     owns every object; migrations run as it
--   dovecote_writer    an upstream service: appends to the outbox, nothing more
--   dovecote_service   a service that owns slices: the tables of the slices, and appends to the outbox; nothing of the
--                      engine
--   dovecote_worker    relay and consumers
--   dovecote_operator  reads everything, retries, replays, pauses
--   dovecote_viewer    reads everything but keys, encrypted numbers and hashes of codes; changes nothing
--
-- Roles belong to the whole cluster, so another Dovecote database may have made them already.

do $$
declare
    wanted text;
begin
    foreach wanted in array array['dovecote_owner', 'dovecote_writer', 'dovecote_service', 'dovecote_worker',
                                  'dovecote_operator', 'dovecote_viewer'] loop
        if not exists (select from pg_catalog.pg_roles where rolname = wanted) then
            begin
                execute format('create role %I nologin', wanted);
            exception
                when duplicate_object or unique_violation then null;  -- a neighbour was faster
                when insufficient_privilege then
                    raise exception 'role % is missing and % may not create it', wanted, current_user
                        using hint = format('Have an administrator run: create role %I nologin;', wanted)
                            || case when wanted = 'dovecote_owner' then format(' grant %I to %I;', wanted, current_user)
                                    else '' end;
            end;
        end if;
    end loop;
    if not pg_has_role(current_user, 'dovecote_owner', 'member') then
        execute format('grant dovecote_owner to %I', current_user);
    end if;
end $$;

grant usage, create on schema dovecote to dovecote_owner;
grant usage on schema dovecote
    to dovecote_writer, dovecote_service, dovecote_worker, dovecote_operator, dovecote_viewer;

-- Processes wait for their schema. Alembic's own table belongs to the login that migrates.
grant select on dovecote.dovecote_version to dovecote_worker, dovecote_operator, dovecote_viewer;
