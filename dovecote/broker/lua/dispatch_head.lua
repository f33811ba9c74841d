#!lua flags=allow-oom
-- Put before Dramatiq's dispatch.lua.
--
-- A full Redis still lets workers fetch, acknowledge and be reaped: that is how it gets room again. And the clock of
-- Redis decides which worker is dead: by the workers' own clocks, one that is ahead would take all others for dead.
local now = redis.call('time')
ARGV[2] = now[1] * 1000 + math.floor(now[2] / 1000)
