-- The roles themselves stay while another database of this cluster still uses them.

revoke select on dovecote.dovecote_version from dovecote_worker, dovecote_operator, dovecote_viewer;
revoke all on schema dovecote from dovecote_owner, dovecote_writer, dovecote_service, dovecote_worker,
                                   dovecote_operator, dovecote_viewer;

do $$
declare
    doomed text;
begin
    foreach doomed in array array['dovecote_viewer', 'dovecote_service', 'dovecote_operator', 'dovecote_worker',
                                  'dovecote_writer', 'dovecote_owner'] loop
        begin
            execute format('drop role if exists %I', doomed);
        exception
            when dependent_objects_still_exist or insufficient_privilege or object_in_use then null;
        end;
    end loop;
end $$;
