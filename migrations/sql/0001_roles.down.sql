-- The roles themselves stay while another database of this cluster still uses them.

revoke all on schema dovecote from dovecote_owner, dovecote_writer, dovecote_worker, dovecote_operator;

do $$
declare
    doomed text;
begin
    foreach doomed in array array['dovecote_operator', 'dovecote_worker', 'dovecote_writer', 'dovecote_owner'] loop
        begin
            execute format('drop role if exists %I', doomed);
        exception
            when dependent_objects_still_exist or insufficient_privilege or object_in_use then null;
        end;
    end loop;
end $$;
