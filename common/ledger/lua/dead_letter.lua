-- Dead-letter the groups of a sampled batch that cannot be decoded, and make all others of it and of later batches unread again.
-- ARGV: step, process, max_dead_bytes, then group, detail of each.   Returns the number of dead-lettered groups.
local dead_lettered = 0
dissolve_from(ARGV[1])
for i = 4, #ARGV, 2 do
  remove_from_buffer(ARGV[i])
  dead_lettered = dead_lettered + dead_letter(ARGV[i], 'train', 'undecodable', ARGV[i + 1], ARGV[2], ARGV[3])
end
return dead_lettered
