-- The trainer resumed from a checkpoint older than one that was acknowledged (the newer one is damaged). Groups settled as
-- trained after it are in no surviving policy: count them as dropped.
-- ARGV: step   Returns the number of these groups.
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
