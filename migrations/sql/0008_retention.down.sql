drop trigger skip_dropped_week on dovecote.processed_events_default;
drop trigger refuse_dropped_week on dovecote.outbox_default;
drop function dovecote.forget_handler, dovecote.place_strays, dovecote.copy_strays, dovecote.make_aside, dovecote.stray_weeks, dovecote.stray_key,
              dovecote.drop_week, dovecote.idle_batches, dovecote.hold_week, dovecote.week_obstacles, dovecote.fact_of,
              dovecote.week_monday, dovecote.week_suffix, dovecote.skip_dropped_week, dovecote.refuse_dropped_week;
drop table dovecote.dropped_weeks;
