-- Groups of a batch that was dealt out cannot be read: they are dead letters, and the others of it may be taken again. So
-- are those of batches after it. ARGV: step, process, then group, detail of each.   Returns how many died.
local details, versions, buried = {}, {}, 0
for i = 3, #ARGV, 2 do details[ARGV[i]] = ARGV[i + 1] end
for _, taken in ipairs(redis.call('ZRANGEBYSCORE', key('batches'), ARGV[1], '+inf')) do
  for _, line in ipairs(batch_lines(taken)) do
    local detail = details[line.group]
    if detail then
      redis.call('XACK', key('stream:' .. line.version), 'trainer', line.entry)
      redis.call('XDEL', key('stream:' .. line.version), line.entry)
      buried = buried + dead_letter(line.group, 'train', 'undecodable', detail, ARGV[2])
    else
      give_back(line.group, line.version, line.entry)
    end
    versions[line.version] = true
  end
  forget_batch(taken)
end
for version in pairs(versions) do discard_if_empty(version) end
return buried
