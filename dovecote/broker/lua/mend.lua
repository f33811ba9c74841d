#!lua flags=allow-oom
-- Delete keys of ours that are of another type than ours: every command on such a key fails.
--
-- KEYS     our keys
-- ARGV     what type each is of
--
-- Returns those that were deleted.
local deleted = {}
for i, key in ipairs(KEYS) do
    local type = redis.call('type', key).ok
    if type ~= 'none' and type ~= ARGV[i] then
        redis.call('unlink', key)
        deleted[#deleted + 1] = key
    end
end
return deleted
