-- Leases of parts still being worked on. ARGV: lease_ms, group, part, holder, group, part, holder, ...
-- Returns the "<group>|<part>" that their holder lost.
local deadline = now_ms() + tonumber(ARGV[1])
local lost = {}
for i = 2, #ARGV, 3 do
  local group, part, holder = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if redis.call('HGET', key('g:' .. group), 'by:' .. part) == holder and redis.call('ZSCORE', key('deadlines'), member(group, part)) then
    redis.call('ZADD', key('deadlines'), deadline, member(group, part))
  else
    lost[#lost + 1] = member(group, part)
  end
end
return lost
