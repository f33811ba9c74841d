#!lua flags=allow-oom
-- Give unfinished messages back to the head of their queue, in the order they were taken.
--
-- KEYS[1]  the set of messages this worker holds of the queue
-- KEYS[2]  the queue
-- ARGV     message ids, oldest first
for i = #ARGV, 1, -1 do
    if redis.call('srem', KEYS[1], ARGV[i]) == 1 and redis.call('hexists', KEYS[2] .. '.msgs', ARGV[i]) == 1 then
        redis.call('lpush', KEYS[2], ARGV[i])
        -- What is given back in good order has killed nobody (dovecote/store/poison.py).
        redis.call('hdel', KEYS[2] .. '.in_flight', ARGV[i])
    end
end
