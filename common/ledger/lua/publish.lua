-- Move the policy pointer: the last write of a publication. Credits of the groups that made this version return here; those of
-- batches beyond its step are held again (the trainer resumed from a checkpoint and trains them once more).
-- ARGV: version, parent (-1 = none), trainer step, incarnation, digest, bytes
-- Returns 1; 0 when the served version is already this or a newer one (versions only grow); -1 when a newer incarnation
-- of the trainer has started.
local version, parent, step = tonumber(ARGV[1]), ARGV[2], ARGV[3]
if tonumber(ARGV[4]) < tonumber(redis.call('HGET', key('run'), 'incarnation') or '0') then return -1 end
local served = tonumber(redis.call('HGET', key('policy'), 'version') or '-1')
if served >= version then return 0 end
redis.call('HSET', key('lineage'), version, parent .. ':' .. step .. ':' .. ARGV[5])
redis.call('HSET', key('policy'), 'version', version, 'step', step, 'incarnation', ARGV[4], 'digest', ARGV[5], 'bytes', ARGV[6],
  'published_at', now_s())
redis.call('DEL', key('lost')) -- a step was made
redis.call('XADD', key('publications'), 'MAXLEN', '~', '100', '*', 'version', version)
for _, sampled in ipairs(redis.call('ZRANGE', key('batches'), 0, -1)) do
  local command = tonumber(sampled) <= tonumber(step) and 'SREM' or 'SADD'
  for _, line in ipairs(batch_lines(sampled)) do redis.call(command, key('credit'), line.group) end
end
return 1
