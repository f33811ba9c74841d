-- Make the caller's epoch the one that may publish, unless a newer relay was here.
--
-- KEYS[1]  the relay's marker
-- ARGV[1]  the epoch of the caller
-- ARGV[2]  if given: only where the marker holds this epoch. Another one, or none, means that Redis has
--          forgotten something since; asked here, because it may forget between two calls.
--
-- Returns the epoch found before: -1 for none.
local found = tonumber(redis.call('get', KEYS[1]) or '-1')
if found <= tonumber(ARGV[1]) and (not ARGV[2] or found == tonumber(ARGV[2])) then
    -- Also when it is there already: a full Redis and a replica are to refuse here, not after the history was searched.
    redis.call('set', KEYS[1], ARGV[1])
end
return found
