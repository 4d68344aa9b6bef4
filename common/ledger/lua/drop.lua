-- Drop training groups whose prompts cannot be used. ARGV: reason, detail, rows of an epoch (0 = unknown), group, ...
-- Returns the number of dropped groups.
-- A row that the user's function leaves out (left_out) is no loss; only where every row is, the run ends as with any other.
-- A group in the buffer is skipped: its stream entry or manifest names it, and the trainer would find it empty.
local dropped = 0
for i = 4, #ARGV do
  local stage = redis.call('HGET', key('g:' .. ARGV[i]), 'stage')
  if stage ~= 'ready' and stage ~= 'leased' and settle(ARGV[i], 'train', 'dropped:' .. ARGV[1]) == 1 then
    local note = ARGV[1] == 'left_out' and note_failure or note_end
    note(ARGV[1], 'dropped', ARGV[2], ARGV[i])
    dropped = dropped + 1
  end
end
if dropped > 0 then redis.call('HSET', key('lost'), 'rows', ARGV[3]) end
return dropped
