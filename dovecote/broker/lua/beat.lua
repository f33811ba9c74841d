#!lua flags=allow-oom
-- Note how far Postgres is, and that the leader lives.
--
-- KEYS[1]  the relay's marker, KEYS[2] what goes with it: see claim.lua
-- ARGV[1]  the epoch of the caller
-- ARGV[2]  its history
-- ARGV[3]  the beat in Postgres
-- ARGV[4]  the last beat that Redis has confirmed
--
-- Returns 1; 0 when Redis knows another epoch or history, or a beat that is neither of the two.
local beat = tonumber(redis.call('hget', KEYS[2], 'beat') or '-1') or -1
if redis.call('get', KEYS[1]) ~= ARGV[1] or redis.call('hget', KEYS[2], 'history') ~= ARGV[2]
   or beat < tonumber(ARGV[4]) or beat > tonumber(ARGV[3]) then
    return 0
end
local now = redis.call('time')
redis.call('hset', KEYS[2], 'beat', ARGV[3], 'seen', now[1] * 1000 + math.floor(now[2] / 1000))
return 1
