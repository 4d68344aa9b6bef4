-- Evict what is too old, then take k whole groups for a trainer step, oldest version first, or none.
-- The manifest makes a repeated take of the same step return the same groups.
-- ARGV: step, k, current policy version, max_policy_age
-- Returns {evicted, available, group, group, ...}; fewer than k available -> no groups, and the trainer is woken at k.
local step, k, current, max_age = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local batch = key('batch:' .. step)

local out = { 0, k }
local held = redis.call('LRANGE', batch, 0, -1)
if #held > 0 then
  for _, line in ipairs(held) do out[#out + 1] = string.match(line, '|([^|]+)$') end
  return out
end

local evicted, available, fresh = 0, 0, {}
for _, version in ipairs(redis.call('ZRANGE', key('versions'), 0, -1)) do
  if policy_age(version, current) > max_age then
    local entries = read_entries(version, 1000)
    while #entries > 0 do
      for _, entry in ipairs(entries) do
        redis.call('XACK', key('stream:' .. version), 'trainer', entry[1])
        redis.call('XDEL', key('stream:' .. version), entry[1])
        -- trained before and kept for resampling: it was not wasted
        if redis.call('HGET', key('g:' .. entry[2]), 'samples') then
          settle(entry[2], 'train', 'trained')
        else
          evicted = evicted + settle(entry[2], 'train', 'dropped:stale')
        end
      end
      entries = read_entries(version, 1000)
    end
    discard_if_empty(version)
  else
    fresh[#fresh + 1] = version
    available = available + unread(version)
  end
end
out[1], out[2] = evicted, available
if available < k then
  redis.call('SET', key('want'), k)
  return out
end

local seconds, missing = now_s(), k
for _, version in ipairs(fresh) do
  if missing == 0 then break end
  for _, entry in ipairs(read_entries(version, missing)) do
    local group = entry[2]
    redis.call('RPUSH', batch, version .. '|' .. entry[1] .. '|' .. group)
    redis.call('HSET', key('g:' .. group), 'stage', 'leased', 't:leased', seconds)
    redis.call('HINCRBY', key('g:' .. group), 'samples', 1)
    out[#out + 1] = group
    missing = missing - 1
  end
end
redis.call('ZADD', key('batches'), step, step)
redis.call('DEL', key('want'), key('wake'))
return out
