-- Requeue a dead-lettered group: fresh attempts for the stages whose results it lacks; one that lacks none (its results could
-- not be decoded) is generated again.
-- ARGV: group, queued_ms, plan (begin_stages)
-- Returns the stages to send; none when the group is not dead, or has lost its prompt for good.
-- Forget all results of a group but its prompt, and make pending what follows. Returns the stages to send.
local function generate_again(group, plan, deadline)
  local g, freed = key('g:' .. group), 0
  for stage, needs in string.gmatch(plan, '([^ <]+)<([^ ]*)') do
    if needs ~= '' then
      freed = freed + redis.call('HSTRLEN', g, stage)
      redis.call('HDEL', g, stage)
      for _, name in ipairs({ 'n:', 'by:', 'p:', 'i:', 's:', 'w:', 't:' }) do redis.call('HDEL', g, name .. stage) end
    end
  end
  redis.call('HINCRBY', g, 'bytes', -freed)
  redis.call('DECRBY', key('bytes'), freed)
  redis.call('HDEL', g, 'version', 'entry', 'samples', 't:ready', 't:leased')
  return begin_stages(group, plan, deadline)
end

local group, queued_ms, plan = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local g = key('g:' .. group)
if redis.call('ZSCORE', key('dead'), group) == false then return {} end

local kind, reason = redis.call('HGET', g, 'kind'), redis.call('HGET', g, 'dead_reason')
-- Without its prompt a training group is prepared again from its cursor; one of an evaluation has nothing to begin with.
if kind == 'eval' and redis.call('HEXISTS', g, 'task') == 0 then return {} end
if kind == 'train' then redis.call('HSETNX', g, 'cursor', string.sub(group, 2)) end
redis.call('ZREM', key('dead'), group)
redis.call('DECRBY', key('dead_bytes'), letter_bytes(group))
redis.call('INCRBY', key('bytes'), redis.call('HGET', g, 'bytes') or '0')
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
for _, stage in ipairs(begun) do
  for _, name in ipairs({ 'n:', 'by:', 'p:', 'i:', 's:' }) do redis.call('HDEL', g, name .. stage) end
end
return #begun > 0 and begun or generate_again(group, plan, now_ms() + queued_ms)
