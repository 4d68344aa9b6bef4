-- Remove dead letters and what they hold. ARGV: group, ...   Returns the number removed.
local discarded = 0
for _, group in ipairs(ARGV) do discarded = discarded + discard(group) end
return discarded
