#!lua flags=allow-oom
-- Return what is held to the head of its queue, so that the oldest is first.
--
-- KEYS[1]  the list of what is held
-- KEYS[2]  the queue
-- ARGV[1]  most messages of one call: no other client is served meanwhile
--
-- Returns how many are still held.
for _ = 1, tonumber(ARGV[1]) do
    if not redis.call('lmove', KEYS[1], KEYS[2], 'RIGHT', 'LEFT') then
        break
    end
end
return redis.call('llen', KEYS[1])
