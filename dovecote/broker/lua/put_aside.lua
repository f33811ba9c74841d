#!lua flags=allow-oom
-- Put messages of a paused handler aside, in the order they were taken. They stay known as queued: whoever publishes
-- them again adds nothing.
--
-- KEYS[1]  the set of messages this worker holds of the queue
-- KEYS[2]  the list of what is put aside
-- ARGV     message ids, oldest first
for _, id in ipairs(ARGV) do
    -- Not ours any more: we were taken for dead, and somebody else has it by now.
    if redis.call('srem', KEYS[1], id) == 1 then
        redis.call('rpush', KEYS[2], id)
    end
end
