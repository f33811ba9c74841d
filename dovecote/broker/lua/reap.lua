#!lua flags=allow-oom
-- Take the messages of dead workers back to the head of their queue, and count the crash of each beside them.
--
-- KEYS[1]  the queue
-- KEYS[2]  when each worker was last heard of
-- ARGV[1]  how many milliseconds of silence are death
-- ARGV[2]  prefix of the sets of messages that workers hold
-- ARGV[3]  the queue's name without its namespace
-- ARGV[4]  how many seconds a count is kept: it goes with its message, and by itself should that get lost
--
-- Returns how many messages were taken back.
local taken = 0
local crashes = KEYS[1] .. '.crashes'
local now = redis.call('time')
local present = now[1] * 1000 + math.floor(now[2] / 1000)
local latest = present - ARGV[1]
-- Heartbeats of no time that a worker can have told: whoever wrote them would never be found dead, and what it is said
-- to hold would be in its hands for ever. Some in a call: nobody else is served meanwhile.
for _, range in ipairs({{'-inf', '(0'}, {'(' .. present + ARGV[1], '+inf'}}) do
    for _, worker in ipairs(redis.call('zrangebyscore', KEYS[2], range[1], range[2], 'LIMIT', 0, 1000)) do
        redis.call('zadd', KEYS[2], 0, worker)
    end
end
for _, worker in ipairs(redis.call('zrangebyscore', KEYS[2], 0, latest)) do
    local held = ARGV[2] .. worker .. '.' .. ARGV[3]
    -- Not a set: somebody else's, and deleted below.
    local ids = redis.call('type', held).ok == 'set' and redis.call('smembers', held) or {}
    for i = #ids, 1, -1 do
        if redis.call('hexists', KEYS[1] .. '.msgs', ids[i]) == 1 then
            local known = tonumber(redis.call('hget', crashes, ids[i]) or '0')
            redis.call('hset', crashes, ids[i], math.min(known or 0, 1000000) + 1)
            redis.call('lpush', KEYS[1], ids[i])
            taken = taken + 1
        end
    end
    redis.call('del', held)
end
if taken > 0 then
    redis.call('expire', crashes, ARGV[4])
end
return taken
