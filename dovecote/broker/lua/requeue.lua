#!lua flags=allow-oom
-- Return unfinished messages to the head of their queue, in the order they were fetched.
--
-- KEYS[1]  the set of messages that this worker has fetched from the queue
-- KEYS[2]  the queue
-- ARGV     message ids, oldest first
for i = #ARGV, 1, -1 do
    if redis.call('srem', KEYS[1], ARGV[i]) == 1 and redis.call('hexists', KEYS[2] .. '.msgs', ARGV[i]) == 1 then
        redis.call('lpush', KEYS[2], ARGV[i])
        -- What is requeued in good order has killed no process (dovecote/store/poison.py).
        redis.call('hdel', KEYS[2] .. '.in_flight', ARGV[i])
    end
end
