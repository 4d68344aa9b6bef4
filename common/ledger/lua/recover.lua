-- Find groups in flight to which no other key leads any more (a stream was deleted or evicted, a deadline, the group itself). What
-- they lack is made again, and those that lack nothing return to the buffer; a group of an evaluation without its prompt is
-- dead-lettered.
-- ARGV: kind, plan (begin_stages), queued_ms, max_dead_bytes, group, ...
-- Returns {group, stage, group, stage, ...} to send
local kind, plan, queued_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

local function is_pending(group)
  for _, stage in ipairs(redis.call('SMEMBERS', key('pending:' .. group))) do
    if redis.call('ZSCORE', key('deadlines'), member(group, stage)) then return true end
  end
  return false
end

-- An entry of a group that has lost everything else; the trainer finds it, and dead-letters it as undecodable.
local function is_in_a_stream(group)
  for _, version in ipairs(redis.call('ZRANGE', key('versions'), 0, -1)) do
    for _, entry in ipairs(has_stream(version) and redis.call('XRANGE', key('stream:' .. version), '-', '+') or {}) do
      if entry[2][2] == group then return true end
    end
  end
  return false
end

local function is_reachable(group)
  local stage, version, entry = unpack(redis.call('HMGET', key('g:' .. group), 'stage', 'version', 'entry'))
  if stage == 'leased' or is_pending(group) then return true end
  if not stage then return is_in_a_stream(group) end
  if stage ~= 'ready' or not has_stream(version) then return false end
  return #redis.call('XRANGE', key('stream:' .. version), entry, entry) > 0
end

local out = {}
for i = 5, #ARGV do
  local group = ARGV[i]
  local g = key('g:' .. group)
  if redis.call('SISMEMBER', key('live:' .. kind), group) == 1 and not is_reachable(group) then
    redis.call('HINCRBY', key('counts:' .. kind), 'recovered', 1)
    redis.call('DEL', key('pending:' .. group))
    if redis.call('EXISTS', g) == 0 and kind == 'eval' then
      redis.call('HSET', g, 'eval', string.match(group, '^e(.+)%.%d+%a$'))
      dead_letter(group, kind, 'lost', 'Redis has lost the group: was its key deleted or evicted?', 'recover', ARGV[4])
    else
      redis.call('HSETNX', g, 'kind', kind)
      redis.call('HSETNX', g, 'cursor', string.sub(group, 2))
      redis.call('HSETNX', g, 'min_version', redis.call('HGET', key('policy'), 'version') or '0')
      redis.call('HSET', g, 'stage', 'recovered')
      local begun = begin_stages(group, plan, now_ms() + queued_ms)
      local version = redis.call('HGET', g, 'version')
      if #begun == 0 and version then file_as_ready(group, version) end
      for _, stage in ipairs(begun) do
        out[#out + 1] = group
        out[#out + 1] = stage
      end
    end
  end
end
return out
