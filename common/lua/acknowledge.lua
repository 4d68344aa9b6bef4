-- A durable checkpoint names every step up to this one: their groups are trained, once and for all.
-- ARGV: step, max_resample_count (-1 = no limit)   Returns how many groups left the ledger.
local limit, settled = tonumber(ARGV[2]), 0
for _, step in ipairs(redis.call('ZRANGEBYSCORE', key('batches'), '-inf', ARGV[1])) do
  local again, touched = {}, {}
  for _, line in ipairs(redis.call('LRANGE', key('batch:' .. step), 0, -1)) do
    local version, entry, group = string.match(line, '^(%d+)|([^|]+)|(.+)$')
    redis.call('XACK', key('stream:' .. version), 'trainer', entry)
    redis.call('XDEL', key('stream:' .. version), entry)
    touched[version] = true
    local samples = tonumber(redis.call('HGET', key('g:' .. group), 'samples') or '0')
    if limit < 0 or samples < limit + 1 then
      again[#again + 1] = { group, version }
    else
      settled = settled + settle(group, 'train', 'trained')
    end
  end
  for _, item in ipairs(again) do file_as_ready(item[1], item[2]) end
  for version in pairs(touched) do discard_if_empty(version) end
  redis.call('DEL', key('batch:' .. step))
  redis.call('ZREM', key('batches'), step)
end
return settled
