#!lua flags=allow-oom
-- Fetch messages from the head of a queue for a worker. Ids come with them: the id that a message gives itself is not
-- trusted.
--
-- KEYS[1]  the queue, KEYS[2] its messages, KEYS[3] the set of what this worker has fetched of it, KEYS[4] heartbeats
-- KEYS[5]  how often a process has died with a message in flight
-- ARGV[1]  the worker
-- ARGV[2]  most messages
-- ARGV[3]  most bytes of one message: of a larger one nothing is returned but its size
-- ARGV[4]  most bytes of all, or a single message
-- ARGV[5]  most bytes of an id, and of a count of crashes. No process of ours has written anything longer: such an
--          id is deleted with its message and returned cut, as a message that is too large; such a count is returned as "?".
--
-- Returns id, size, message or nil, crashes or nil, by turns.
local now = redis.call('time')
redis.call('zadd', KEYS[4], now[1] * 1000 + math.floor(now[2] / 1000), ARGV[1])
local answer, bytes = {}, 0
for _ = 1, tonumber(ARGV[2]) do
    local id = redis.call('lindex', KEYS[1], 0)
    if not id then
        break
    end
    local size = redis.call('hstrlen', KEYS[2], id)
    local fits = size <= tonumber(ARGV[3])
    bytes = bytes + (fits and size or 0)
    if #answer > 0 and bytes > tonumber(ARGV[4]) then
        break
    end
    redis.call('lpop', KEYS[1])
    if #id > tonumber(ARGV[5]) then
        redis.call('hdel', KEYS[2], id)
        redis.call('hdel', KEYS[5], id)
        answer[#answer + 1] = string.sub(id, 1, tonumber(ARGV[5]))
        answer[#answer + 1] = #id
        answer[#answer + 1] = false
        answer[#answer + 1] = false
    -- Without a message: it was acknowledged by a worker that had been taken for dead.
    elseif size > 0 or redis.call('hexists', KEYS[2], id) == 1 then
        redis.call('sadd', KEYS[3], id)
        answer[#answer + 1] = id
        answer[#answer + 1] = size
        answer[#answer + 1] = fits and redis.call('hget', KEYS[2], id)
        local is_count = redis.call('hstrlen', KEYS[5], id) <= tonumber(ARGV[5])
        answer[#answer + 1] = not is_count and '?' or redis.call('hget', KEYS[5], id)
    end
end
return answer
