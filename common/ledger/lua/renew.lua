-- Renew the leases of running stages, and record their progress.
-- ARGV: lease_ms, group, stage, holder, progress of that claim (0 = none), group, stage, holder, progress, ...
-- Returns the "<group>|<stage>" that their holder lost.
local deadline = now_ms() + tonumber(ARGV[1])
local lost = {}
for i = 2, #ARGV, 4 do
  local group, stage, holder, progress = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  if redis.call('HGET', key('g:' .. group), 'by:' .. stage) == holder and redis.call('ZSCORE', key('deadlines'), member(group, stage)) then
    redis.call('ZADD', key('deadlines'), deadline, member(group, stage))
    if progress ~= '0' then redis.call('HSET', key('g:' .. group), 'p:' .. stage, progress) end
  else
    lost[#lost + 1] = member(group, stage)
  end
end
return lost
