-- Make the caller's epoch the one that may publish, unless a newer relay was here.
--
-- KEYS[1]  the relay's marker
-- ARGV[1]  the epoch of the caller
--
-- Returns the epoch found before: -1 for none.
local found = redis.call('get', KEYS[1])
if not found or tonumber(found) <= tonumber(ARGV[1]) then
    -- Also when it is there already: a full Redis and a replica are to refuse here, not after the history was searched.
    redis.call('set', KEYS[1], ARGV[1])
end
return tonumber(found or '-1')
