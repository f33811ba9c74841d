-- Make the caller's epoch and history the ones that may publish, unless Redis is not in the expected state.
--
-- KEYS[1]  the fencing token: the epoch that may publish
-- KEYS[2]  what belongs to it: history, instance (the run of Postgres), heartbeat, seen
-- ARGV[1]  the epoch of the caller
-- ARGV[2]  its history
-- ARGV[3]  the run of Postgres it is connected to
-- ARGV[4]  the heartbeat in Postgres
-- ARGV[5]  the history it takes Redis to be in, empty for none. Compared here, because another relay may come, and Redis
--          may lose it, between two calls.
-- ARGV[6]  if given: only where the token has this epoch and the run is the caller's
-- ARGV[7]  and the heartbeat is from here to ARGV[4]. Higher: Postgres has lost something. Lower: Redis has.
--
-- Returns the epoch found before, -1 for none; and whether it was claimed.
local found = tonumber(redis.call('get', KEYS[1]) or '-1') or -1
-- No epoch is so far ahead: it is made up.
if not (found >= 0 and found <= tonumber(ARGV[1]) + 1000000) then
    found = -1
end
local known = redis.call('hmget', KEYS[2], 'history', 'instance', 'heartbeat')
if found > tonumber(ARGV[1]) or (known[1] or '') ~= ARGV[5] then
    return {found, 0}
end
if ARGV[6] then
    local heartbeat = tonumber(known[3] or '-1') or -1
    if found ~= tonumber(ARGV[6]) or known[2] ~= ARGV[3]
       or heartbeat < tonumber(ARGV[7]) or heartbeat > tonumber(ARGV[4]) then
        return {found, 0}
    end
end
-- Also when it is there already: a full Redis and a replica are to refuse here, not after the history was searched.
redis.call('set', KEYS[1], ARGV[1])
local now = redis.call('time')
redis.call('hset', KEYS[2], 'history', ARGV[2], 'instance', ARGV[3], 'heartbeat', ARGV[4],
           'seen', now[1] * 1000 + math.floor(now[2] / 1000))
return {found, 1}
