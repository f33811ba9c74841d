#!lua flags=allow-oom
-- Record the leader's heartbeat, and that it is alive.
--
-- KEYS[1]  the fencing token, KEYS[2] what belongs to it: see claim.lua
-- ARGV[1]  the epoch of the caller
-- ARGV[2]  its history
-- ARGV[3]  the heartbeat in Postgres
-- ARGV[4]  the last heartbeat that Redis has confirmed
--
-- Returns 1; 0 when Redis has another epoch or history, or a heartbeat outside of these two.
local heartbeat = tonumber(redis.call('hget', KEYS[2], 'heartbeat') or '-1') or -1
if redis.call('get', KEYS[1]) ~= ARGV[1] or redis.call('hget', KEYS[2], 'history') ~= ARGV[2]
   or heartbeat < tonumber(ARGV[4]) or heartbeat > tonumber(ARGV[3]) then
    return 0
end
local now = redis.call('time')
redis.call('hset', KEYS[2], 'heartbeat', ARGV[3], 'seen', now[1] * 1000 + math.floor(now[2] / 1000))
return 1
