-- A dead-lettered group gets another life: fresh attempts for the stages it still lacks.
-- ARGV: group, queued_ms, stages that a complete group has (comma-separated)
-- Returns the stages to send; none when the group is not dead.
local group, queued_ms, complete = ARGV[1], tonumber(ARGV[2]), split(ARGV[3])
local g = key('g:' .. group)
if redis.call('ZSCORE', key('dead'), group) == false then return {} end

local kind, reason = redis.call('HGET', g, 'kind'), redis.call('HGET', g, 'dead_reason')
local pending = {}
if redis.call('HEXISTS', g, 'task') == 0 then
  pending = { 'task' }
elseif redis.call('HEXISTS', g, 'rollout') == 0 then
  pending = { 'rollout' }
else
  for _, stage in ipairs(complete) do
    if redis.call('HEXISTS', g, stage) == 0 then pending[#pending + 1] = stage end
  end
end

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
redis.call('HSET', g, 'stage', pending[1] == 'task' and 'admitted' or 'requeued')
for _, stage in ipairs(pending) do
  redis.call('HDEL', g, 'n:' .. stage, 'by:' .. stage, 's:' .. stage)
  redis.call('ZADD', key('deadlines'), now_ms() + queued_ms, member(group, stage))
end
return pending
