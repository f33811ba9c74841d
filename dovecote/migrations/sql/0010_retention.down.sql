drop function dovecote.drop_week, dovecote.idle_batches, dovecote.hold_week, dovecote.week_obstacles;
