#!lua flags=allow-oom
-- Bring what was put aside back to the head of its queue, the oldest first of all.
--
-- KEYS[1]  the list of what is put aside
-- KEYS[2]  the queue
-- ARGV[1]  most messages of one call: nobody else is served meanwhile
--
-- Returns how many are still aside.
for _ = 1, tonumber(ARGV[1]) do
    if not redis.call('lmove', KEYS[1], KEYS[2], 'RIGHT', 'LEFT') then
        break
    end
end
return redis.call('llen', KEYS[1])
