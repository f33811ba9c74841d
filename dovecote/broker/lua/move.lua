#!lua flags=allow-oom
-- Move messages to the queues that their handlers' routes name today, in order. The ids stay: a message that is there
-- already is there once. So does every byte: they are signed. Others keep their places.
--
-- KEYS[1]  the fencing token: the epoch of the relay that may do this
-- KEYS[2]  the list of ids: a queue, or what is held from it
-- KEYS[3]  the queue's full name
-- ARGV[1]  the epoch of the caller
-- ARGV[2]  prefix of full names
-- ARGV[3]  what follows a queue's name: ".DQ" for a delay queue
-- ARGV[4]  what follows the name of a list: ".held.<handler>"
-- ARGV[5]  1: begin at the end, and put what is found at the head of its queue: what is older than all that is there.
--          0: begin at the head, and put it at the end
-- ARGV[6]  how many keep their places where to begin: those of calls before
-- ARGV[7]  most messages of one call
-- ARGV[8]  most bytes: no other client is served meanwhile
-- ARGV     then handlers and their queues, by turns
--
-- Returns how many were moved, how many keep their places, and how many are not looked at yet; -1 and -2 as publish.lua.
local epoch = tonumber(redis.call('get', KEYS[1]) or '-1') or -1
-- No epoch is so far ahead: it is made up.
if epoch > tonumber(ARGV[1]) + 1000000 then
    epoch = -1
end
if epoch > tonumber(ARGV[1]) then
    return {-2, 0, 0}
end
if epoch < tonumber(ARGV[1]) then
    return {-1, 0, 0}
end
local queue_of = {}
for i = 9, #ARGV, 2 do
    queue_of[ARGV[i]] = ARGV[i + 1] .. ARGV[3]
end
local list, from = KEYS[2], KEYS[3]
local from_end, passed = ARGV[5] == '1', tonumber(ARGV[6])
local length = redis.call('llen', list)
local first = from_end and math.max(0, length - passed - ARGV[7]) or passed
local last = from_end and length - passed - 1 or passed + ARGV[7] - 1
local ids = last >= first and redis.call('lrange', list, first, last) or {}

local moved, gone, kept, bytes = 0, 0, 0, 0
for n = 1, #ids do
    if bytes >= tonumber(ARGV[8]) then
        break
    end
    local i = from_end and #ids + 1 - n or n
    local id = ids[i]
    local message = redis.call('hget', from .. '.msgs', id)
    bytes = bytes + (message and #message or 0)
    local handler = message and string.match(
        string.sub(message, 1, 1000), '^{"queue_name":"[^"\\]*","actor_name":"([^"\\]*)"')
    local queue = handler and queue_of[handler]
    local to = queue and ARGV[2] .. queue
    if message and (not to or to == from) then
        kept = kept + 1
    else
        -- Without a message: it was acknowledged by a worker that had been taken for dead.
        if to then
            if redis.call('hsetnx', to .. '.msgs', id, message) == 1 then
                redis.call(from_end and 'lpush' or 'rpush', to .. ARGV[4], id)
            end
            redis.call('hdel', from .. '.msgs', id)
            for _, kind in ipairs({'.in_flight', '.crashes'}) do
                local kept_of_it = redis.call('hget', from .. kind, id)
                if kept_of_it then
                    redis.call('hset', to .. kind, id, kept_of_it)
                    redis.call('expire', to .. kind, math.max(1, redis.call('ttl', from .. kind)))
                    redis.call('hdel', from .. kind, id)
                end
            end
            moved = moved + 1
        end
        redis.call('lset', list, first + i - 1, '')
        gone = gone + 1
    end
end
if gone > 0 then
    redis.call('lrem', list, from_end and -gone or gone, '')
end
return {moved, kept, math.max(0, length - gone - passed - kept)}
