-- The trainer went back to a checkpoint older than one that was acknowledged (the newer one is damaged). What was settled
-- as trained after it is not in any surviving policy: it is counted as dropped.
-- ARGV: step   Returns how many groups that are.
local lost = 0
for _, step in ipairs(redis.call('HKEYS', key('settled'))) do
  if tonumber(step) > tonumber(ARGV[1]) then
    lost = lost + tonumber(redis.call('HGET', key('settled'), step))
    redis.call('HDEL', key('settled'), step)
  end
end
if lost > 0 then
  redis.call('HINCRBY', key('counts:train'), 'trained', -lost)
  redis.call('HINCRBY', key('counts:train'), 'dropped:rolled_back', lost)
end
return lost
