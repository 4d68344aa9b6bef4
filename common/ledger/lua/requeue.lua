-- Requeue a dead-lettered group: fresh attempts for the stages whose results it lacks.
-- ARGV: group, queued_ms, plan (begin_stages)
-- Returns the stages to send; none when the group is not dead.
local group, queued_ms, plan = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local g = key('g:' .. group)
if redis.call('ZSCORE', key('dead'), group) == false then return {} end

local kind, reason = redis.call('HGET', g, 'kind'), redis.call('HGET', g, 'dead_reason')
redis.call('ZREM', key('dead'), group)
redis.call('SADD', key('live:' .. kind), group)
if redis.call('HINCRBY', key('counts:' .. kind), 'dead:' .. reason, -1) == 0 then
  redis.call('HDEL', key('counts:' .. kind), 'dead:' .. reason)
end
if kind == 'train' then redis.call('SADD', key('credit'), group) end
local id = redis.call('HGET', g, 'eval')
if id then
  redis.call('HDEL', key('eval:' .. id), 'dead:' .. group)
  redis.call('HINCRBY', key('eval:' .. id), 'done', -1)
  redis.call('HSET', key('evaluations'), id, redis.call('HGET', g, 'pinned'))
end
redis.call('HDEL', g, 'dead_reason', 'dead_detail', 'dead_worker', 'last_error')
redis.call('HSET', g, 'stage', 'requeued')
local begun = begin_stages(group, plan, now_ms() + queued_ms)
for _, stage in ipairs(begun) do redis.call('HDEL', g, 'n:' .. stage, 'by:' .. stage, 's:' .. stage) end
return begun
