-- Put a batch of messages on their queues, in order, once each.
--
-- KEYS[1]  the fencing token: the epoch of the relay that may publish
-- KEYS[2]  what belongs to it: see claim.lua
-- ARGV[1]  the epoch of the caller
-- ARGV[2]  its history
-- ARGV     then for each message: full queue name, message id, message
--
-- Returns how many messages were new; -1 when the token is gone or an older one is back (Redis lost what it was
-- given), or is of another history; -2 when a newer relay has taken over.
local epoch = tonumber(redis.call('get', KEYS[1]) or '-1') or -1
-- No epoch is so far ahead: it is made up.
if epoch > tonumber(ARGV[1]) + 1000000 then
    epoch = -1
end
if epoch > tonumber(ARGV[1]) then
    return -2
end
if epoch < tonumber(ARGV[1]) then
    return -1
end
-- Two databases that were one may both have come to this epoch.
if redis.call('hget', KEYS[2], 'history') ~= ARGV[2] then
    return -1
end
local added = 0
for i = 3, #ARGV, 3 do
    -- A message that is still queued or in flight keeps its place. The list first: if that key is no list, this fails
    -- before a message is there without it.
    if redis.call('hexists', ARGV[i] .. '.msgs', ARGV[i + 1]) == 0 then
        redis.call('rpush', ARGV[i], ARGV[i + 1])
        redis.call('hset', ARGV[i] .. '.msgs', ARGV[i + 1], ARGV[i + 2])
        added = added + 1
    end
end
return added
