drop trigger widen_progress on dovecote.subscriptions;
drop trigger begin_progress on dovecote.subscriptions;
drop function dovecote.unblocked_up_to, dovecote.reopen_progress, dovecote.widen_progress, dovecote.begin_progress,
              dovecote.open_progress, dovecote.unprocessed, dovecote.move_low_water_marks, dovecote.examine_again, dovecote.absent,
              dovecote.outstanding_of, dovecote.events_in, dovecote.coarser, dovecote.wanted_since;
drop view dovecote.progress_lock;
drop table dovecote.progress;
