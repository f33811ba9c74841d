-- Two roles more that log in as nobody: grant them to the logins of people and services.
--
--   dovecote_viewer   looks at everything but keys, encrypted numbers and hashes of codes; changes nothing
--   dovecote_service  a service that owns slices: the tables of the slices, and appends to the outbox; nothing of the
--                     engine
--
-- Roles belong to the whole cluster, so another Dovecote database may have made them already.

do $$
declare
    wanted text;
begin
    foreach wanted in array array['dovecote_viewer', 'dovecote_service'] loop
        if not exists (select from pg_catalog.pg_roles where rolname = wanted) then
            begin
                execute format('create role %I nologin', wanted);
            exception
                when duplicate_object or unique_violation then null;  -- a neighbour was faster
                when insufficient_privilege then
                    raise exception 'role % is missing and % may not create it', wanted, current_user
                        using hint = format('Have an administrator run: create role %I nologin;', wanted);
            end;
        end if;
    end loop;
end $$;

grant usage on schema dovecote to dovecote_viewer, dovecote_service;
