#!lua flags=allow-oom
-- Take the messages of dead workers back to the head of their queue, and count the crash in each message.
--
-- KEYS[1]  the queue
-- KEYS[2]  when each worker was last heard of
-- ARGV[1]  how many milliseconds of silence are death
-- ARGV[2]  prefix of the sets of messages that workers hold
-- ARGV[3]  the queue's name without its namespace
--
-- Returns how many messages were taken back.
--
-- A bundle is JSON whose last line begins with `]],"kwargs":{"`, and no payload has a line break.
local function with_one_crash_more(message, id)
    local envelopes, rest = string.match(message, '^(.*)(\n%]%],"kwargs":{".*)$')
    if not rest then
        return message
    end
    local crashes = string.match(rest, '"crashes":(%d+)')
    if crashes then
        return envelopes .. string.gsub(rest, '"crashes":%d+', '"crashes":' .. (crashes + 1), 1)
    end
    return envelopes .. '\n]],"kwargs":{"crashes":1,"message_id":"' .. id .. '",' .. string.sub(rest, 15)
end

local taken = 0
local now = redis.call('time')
local latest = now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[1]
for _, worker in ipairs(redis.call('zrangebyscore', KEYS[2], 0, latest)) do
    local held = ARGV[2] .. worker .. '.' .. ARGV[3]
    local ids = redis.call('smembers', held)
    for i = #ids, 1, -1 do
        local message = redis.call('hget', KEYS[1] .. '.msgs', ids[i])
        if message then
            redis.call('hset', KEYS[1] .. '.msgs', ids[i], with_one_crash_more(message, ids[i]))
            redis.call('lpush', KEYS[1], ids[i])
            taken = taken + 1
        end
    end
    redis.call('del', held)
end
return taken
