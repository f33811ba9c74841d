#!lua flags=allow-oom
-- Drop our messages from a list: their events may have been lost; those that were not are sent again.
--
-- KEYS[1]  the list: of a queue, or of what is held from it
-- KEYS[2]  the queue
-- KEYS[3]  the fencing token, KEYS[4] what belongs to it: see claim.lua
-- ARGV[1]  the epoch of the caller
-- ARGV[2]  its history. A relay that its Postgres has left behind may have the same epoch as the one that leads now, and
--          must not drop what that one sends.
-- ARGV[3]  how many messages at the head of the list were looked at before and are others'
-- ARGV[4]  most messages of one call: no other client is served meanwhile
--
-- Returns how many were looked at, and how many of them are others', which stay where they are; -1 when the caller may
-- not publish any more.
if redis.call('get', KEYS[3]) ~= ARGV[1] or redis.call('hget', KEYS[4], 'history') ~= ARGV[2] then
    return {-1, 0}
end
if redis.call('type', KEYS[1]).ok ~= 'list' then
    return {0, 0}
end
local first = tonumber(ARGV[3])
local ids = redis.call('lrange', KEYS[1], first, first + ARGV[4] - 1)
local ours = {}
for i, id in ipairs(ids) do
    if #id == 33 and string.find(id, '^[br][0-9a-f]+$') then
        ours[#ours + 1] = id
        redis.call('lset', KEYS[1], first + i - 1, '')
    end
end
if #ours > 0 then
    redis.pcall('hdel', KEYS[2] .. '.msgs', unpack(ours))
    -- dovecote/store/poison.py: what was in flight in a crash.
    redis.pcall('hdel', KEYS[2] .. '.in_flight', unpack(ours))
    redis.pcall('hdel', KEYS[2] .. '.crashes', unpack(ours))
    redis.call('lrem', KEYS[1], #ours, '')
end
return {#ids, #ids - #ours}
