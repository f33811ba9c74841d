#!lua flags=allow-oom
-- Return a message that cannot be fetched to its queue: its text is there, but it is in no list and not in flight.
--
-- KEYS[1]  the fencing token: the epoch of the relay that may publish
-- KEYS[2]  the queue
-- KEYS[3]  the last heartbeat of each worker
-- KEYS[4]  what is held for the handler
-- ARGV[1]  the epoch of the caller
-- ARGV[2]  message id
-- ARGV[3]  prefix of the sets of messages that workers have fetched
-- ARGV[4]  the queue's name without its namespace
-- ARGV[5]  how many messages at either end of the queue are looked at: the caller has looked at all of it before, and
--          what has come back since is at an end
--
-- Returns whether the message was put back.
if tonumber(redis.call('get', KEYS[1]) or '-1') ~= tonumber(ARGV[1]) then
    return 0
end
if redis.call('hexists', KEYS[2] .. '.msgs', ARGV[2]) == 0 or redis.call('exists', KEYS[4]) == 1 then
    return 0
end
if redis.call('lpos', KEYS[2], ARGV[2], 'MAXLEN', ARGV[5])
    or redis.call('lpos', KEYS[2], ARGV[2], 'RANK', -1, 'MAXLEN', ARGV[5]) then
    return 0
end
-- The set of a worker without a heartbeat counts for nothing: it would never be reaped.
for _, worker in ipairs(redis.call('zrange', KEYS[3], 0, -1)) do
    if redis.call('sismember', ARGV[3] .. worker .. '.' .. ARGV[4], ARGV[2]) == 1 then
        return 0
    end
end
redis.call('rpush', KEYS[2], ARGV[2])
return 1
