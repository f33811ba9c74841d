#!lua flags=allow-oom
-- Remove refused messages; while there is room they are kept among the dead letters of the queue.
--
-- KEYS[1]  the set of messages that this worker has fetched from the queue
-- KEYS[2]  the queue, KEYS[3] its dead letters
-- ARGV[1]  most dead letters, and ARGV[2] most bytes of one
-- ARGV     message ids
local now = redis.call('time')
for i = 3, #ARGV do
    local id = ARGV[i]
    if redis.call('srem', KEYS[1], id) == 1 then
        if redis.call('hstrlen', KEYS[2] .. '.msgs', id) <= tonumber(ARGV[2])
           and redis.call('zcard', KEYS[3]) < tonumber(ARGV[1]) then
            local message = redis.call('hget', KEYS[2] .. '.msgs', id)
            if message then
                redis.call('zadd', KEYS[3], now[1] * 1000 + math.floor(now[2] / 1000), id)
                redis.call('hset', KEYS[3] .. '.msgs', id, message)
            end
        end
        redis.call('hdel', KEYS[2] .. '.msgs', id)
        redis.call('hdel', KEYS[2] .. '.in_flight', id)
        redis.call('hdel', KEYS[2] .. '.crashes', id)
    end
end
