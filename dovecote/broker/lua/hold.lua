#!lua flags=allow-oom
-- Hold messages of a paused handler, in the order they were fetched. They stay known as queued: publishing them again
-- adds nothing.
--
-- KEYS[1]  the set of messages that this worker has fetched from the queue
-- KEYS[2]  the list of what is held
-- ARGV     message ids, oldest first
for _, id in ipairs(ARGV) do
    -- Otherwise this worker was taken for dead, and another one has the message by now.
    if redis.call('srem', KEYS[1], id) == 1 then
        redis.call('rpush', KEYS[2], id)
    end
end
