-- Four roles that log in as nobody: grant them to the logins of your services.
--
--   dovecote_owner     owns every object; migrations run as it
--   dovecote_writer    an upstream service: appends to the outbox, nothing more
--   dovecote_worker    relay and consumers
--   dovecote_operator  looks at everything, retries, replays, pauses
--
-- Roles belong to the whole cluster, so another Dovecote database may have made them already.

do $$
declare
    wanted text;
begin
    foreach wanted in array array['dovecote_owner', 'dovecote_writer', 'dovecote_worker', 'dovecote_operator'] loop
        if not exists (select from pg_roles where rolname = wanted) then
            begin
                execute format('create role %I nologin', wanted);
            exception
                when duplicate_object or unique_violation then null;  -- a neighbour was faster
                when insufficient_privilege then
                    raise exception 'role % is missing and % may not create it', wanted, current_user
                        using hint = format('Have an administrator run: create role %I nologin; grant %I to %I;',
                                            wanted, wanted, current_user);
            end;
        end if;
    end loop;
    if not pg_has_role(current_user, 'dovecote_owner', 'member') then
        execute format('grant dovecote_owner to %I', current_user);
    end if;
end $$;

grant usage, create on schema dovecote to dovecote_owner;
grant usage on schema dovecote to dovecote_writer, dovecote_worker, dovecote_operator;
