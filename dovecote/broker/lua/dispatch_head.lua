#!lua flags=allow-oom
-- Put before Dramatiq's dispatch.lua.
--
-- A full Redis still lets workers fetch, acknowledge and be reaped: that is how it gets room again. And who is
-- dead is told by the clock of Redis: with the workers' own, one that is ahead would take all others for dead.
local now = redis.call('time')
ARGV[2] = now[1] * 1000 + math.floor(now[2] / 1000)
