drop function dovecote.cancel_replay, dovecote.resume_replay, dovecote.pause_replay, dovecote.change_replay,
              dovecote.start_replay, dovecote.plan_replay, dovecote.is_replayed, dovecote.is_asked;
drop table dovecote.replays;
