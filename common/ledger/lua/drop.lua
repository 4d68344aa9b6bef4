-- Drop training groups that will never be trained. ARGV: reason, group, ...   Returns the number of dropped groups.
-- A group in the buffer is skipped: its stream entry or manifest names it, and the trainer would find it empty.
local dropped = 0
for i = 2, #ARGV do
  local stage = redis.call('HGET', key('g:' .. ARGV[i]), 'stage')
  if stage ~= 'ready' and stage ~= 'leased' then dropped = dropped + settle(ARGV[i], 'train', 'dropped:' .. ARGV[1]) end
end
return dropped
