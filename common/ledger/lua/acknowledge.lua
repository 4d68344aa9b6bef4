-- A durable checkpoint names every step up to this one: settle their groups as trained.
-- ARGV: step, max_resample_count (-1 = no limit), group, ... (those that the checkpoints since the last call have trained)
-- Returns the number of groups settled.
local last_step, limit, settled, known = tonumber(ARGV[1]), tonumber(ARGV[2]), 0, {}

-- A group is settled when no resample is left to it, else it is unread again; either way no manifest names it afterwards.
for _, step in ipairs(redis.call('ZRANGEBYSCORE', key('batches'), '-inf', last_step)) do
  local again, touched, count = {}, {}, 0
  for _, line in ipairs(batch_lines(step)) do
    redis.call('XACK', key('stream:' .. line.version), 'trainer', line.entry)
    redis.call('XDEL', key('stream:' .. line.version), line.entry)
    touched[line.version], known[line.group] = true, true
    local samples = tonumber(redis.call('HGET', key('g:' .. line.group), 'samples') or '0')
    if limit < 0 or samples < limit + 1 then
      again[#again + 1] = line
    else
      count = count + settle(line.group, 'train', 'trained')
    end
  end
  for _, line in ipairs(again) do file_as_ready(line.group, line.version) end
  for version in pairs(touched) do discard_if_empty(version) end
  forget_batch(step)
  if count > 0 then redis.call('HINCRBY', key('settled'), step, count) end
  settled = settled + count
end

-- A named group without a manifest is one whose sampling Redis lost (a restart lost the last writes). It is settled at whatever
-- stage it is now, and before the cursor if Redis lost its admission too (`ahead`), so that it is never trained a second time.
local reconciled, cursor = 0, tonumber(redis.call('GET', key('cursor')) or '0')
for i = 3, #ARGV do
  local group = ARGV[i]
  local number = tonumber(string.sub(group, 2))
  if not known[group] and redis.call('SISMEMBER', key('live:train'), group) == 1 then
    -- a group that was sampled before is in the buffer legitimately, for resampling
    if not redis.call('HGET', key('g:' .. group), 'samples') then
      remove_from_buffer(group)
      reconciled = reconciled + settle(group, 'train', 'trained')
    end
  elseif not known[group] and number >= cursor and redis.call('SADD', key('ahead'), group) == 1 then
    redis.call('HINCRBY', key('counts:train'), 'admitted', 1)
    redis.call('HINCRBY', key('counts:train'), 'trained', 1)
    reconciled = reconciled + 1
  end
end
if reconciled > 0 then
  redis.call('HINCRBY', key('counts:train'), 'reconciled', reconciled)
  redis.call('HINCRBY', key('settled'), last_step, reconciled)
end
return settled + reconciled
