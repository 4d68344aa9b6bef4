-- Groups that will never be trained, with the reason. ARGV: kind, reason, group, ...   Returns how many were dropped.
local dropped = 0
for i = 3, #ARGV do dropped = dropped + settle(ARGV[i], ARGV[1], 'dropped:' .. ARGV[2]) end
return dropped
