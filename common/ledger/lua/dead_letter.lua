-- Dead-letter the groups of a sampled batch that cannot be decoded, and make all others of it and of later batches unread again.
-- ARGV: step, process, then group, detail of each.   Returns the number of dead-lettered groups.
local details, versions, dead_lettered = {}, {}, 0
for i = 3, #ARGV, 2 do details[ARGV[i]] = ARGV[i + 1] end
for _, sampled in ipairs(redis.call('ZRANGEBYSCORE', key('batches'), ARGV[1], '+inf')) do
  for _, line in ipairs(batch_lines(sampled)) do
    local detail = details[line.group]
    if detail then
      redis.call('XACK', key('stream:' .. line.version), 'trainer', line.entry)
      redis.call('XDEL', key('stream:' .. line.version), line.entry)
      dead_lettered = dead_lettered + dead_letter(line.group, 'train', 'undecodable', detail, ARGV[2])
    else
      give_back(line.group, line.version, line.entry)
    end
    versions[line.version] = true
  end
  forget_batch(sampled)
end
for version in pairs(versions) do discard_if_empty(version) end
return dead_lettered
