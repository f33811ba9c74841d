-- The roles themselves stay while another database of this cluster still uses them.

revoke all on schema dovecote from dovecote_viewer, dovecote_service;

do $$
declare
    doomed text;
begin
    foreach doomed in array array['dovecote_viewer', 'dovecote_service'] loop
        begin
            execute format('drop role if exists %I', doomed);
        exception
            when dependent_objects_still_exist or insufficient_privilege or object_in_use then null;
        end;
    end loop;
end $$;
