#!lua flags=allow-oom
-- Return the messages of dead workers to the head of their queue, and count a crash beside each.
--
-- KEYS[1]  the queue
-- KEYS[2]  the last heartbeat of each worker
-- ARGV[1]  after how many milliseconds of silence a worker is dead
-- ARGV[2]  prefix of the sets of messages that workers have fetched
-- ARGV[3]  the queue's name without its namespace
-- ARGV[4]  how many seconds a count is kept: it goes with its message, and by itself should that get lost
--
-- Returns how many messages were requeued.
local requeued = 0
local crashes = KEYS[1] .. '.crashes'
local now = redis.call('time')
local present = now[1] * 1000 + math.floor(now[2] / 1000)
local latest = present - ARGV[1]
-- Heartbeats with a time that no worker can have written: such a worker would never be found dead, and its messages
-- would be in flight for ever. Some in a call: no other client is served meanwhile.
for _, range in ipairs({{'-inf', '(0'}, {'(' .. present + ARGV[1], '+inf'}}) do
    for _, worker in ipairs(redis.call('zrangebyscore', KEYS[2], range[1], range[2], 'LIMIT', 0, 1000)) do
        redis.call('zadd', KEYS[2], 0, worker)
    end
end
for _, worker in ipairs(redis.call('zrangebyscore', KEYS[2], 0, latest)) do
    local held = ARGV[2] .. worker .. '.' .. ARGV[3]
    -- Another type is not ours; it is deleted below.
    local ids = redis.call('type', held).ok == 'set' and redis.call('smembers', held) or {}
    for i = #ids, 1, -1 do
        if redis.call('hexists', KEYS[1] .. '.msgs', ids[i]) == 1 then
            local known = tonumber(redis.call('hget', crashes, ids[i]) or '0')
            redis.call('hset', crashes, ids[i], math.min(known or 0, 1000000) + 1)
            redis.call('lpush', KEYS[1], ids[i])
            requeued = requeued + 1
        end
    end
    redis.call('del', held)
end
if requeued > 0 then
    redis.call('expire', crashes, ARGV[4])
end
return requeued
