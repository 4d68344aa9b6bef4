-- Replace results of an evaluation, and the record of admitted groups, by a summary.
-- ARGV: evaluation id, summary that was read ('' where there was none), summary, field that it covers, ...
-- Returns 1, or 0 when another process has folded meanwhile.
local evaluation, before = key('eval:' .. ARGV[1]), ARGV[2]
if (redis.call('HGET', evaluation, 'summary') or '') ~= before then return 0 end
redis.call('HSET', evaluation, 'summary', ARGV[3])
for i = 4, #ARGV do redis.call('HDEL', evaluation, ARGV[i]) end
return 1
