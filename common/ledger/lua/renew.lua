-- Renew the leases of running stages. ARGV: lease_ms, group, stage, holder, group, stage, holder, ...
-- Returns the "<group>|<stage>" that their holder lost.
local deadline = now_ms() + tonumber(ARGV[1])
local lost = {}
for i = 2, #ARGV, 3 do
  local group, stage, holder = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if redis.call('HGET', key('g:' .. group), 'by:' .. stage) == holder and redis.call('ZSCORE', key('deadlines'), member(group, stage)) then
    redis.call('ZADD', key('deadlines'), deadline, member(group, stage))
  else
    lost[#lost + 1] = member(group, stage)
  end
end
return lost
