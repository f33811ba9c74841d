drop function dovecote.drop_partition, dovecote.idle_batches, dovecote.lock_partition, dovecote.partition_blockers;
