-- A worker cannot finish a stage: `failed` spends an attempt, `released` (shutdown) does not.
-- ARGV: mode failed|released, group, stage, holder, reason, detail, max_attempts, queued_ms
-- Returns 'refused' | 'again' (send the stage once more) | 'dead'
local mode, group, stage, holder = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local reason, detail, max_attempts, queued_ms = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local g = key('g:' .. group)

if redis.call('HGET', g, 'by:' .. stage) ~= holder or not redis.call('ZSCORE', key('deadlines'), member(group, stage)) then
  return 'refused'
end
local kind = redis.call('HGET', g, 'kind')
if mode == 'released' then
  redis.call('HINCRBY', g, 'n:' .. stage, -1)
elseif tonumber(redis.call('HGET', g, 'n:' .. stage)) >= max_attempts then
  dead_letter(group, kind, reason, detail, holder)
  return 'dead'
else
  redis.call('HINCRBY', key('counts:' .. kind), 'retried', 1)
  redis.call('HSET', g, 'last_error', reason .. ': ' .. detail)
  if kind == 'train' then note_failure(reason, 'failed', detail, group) end
end
redis.call('HDEL', g, 'by:' .. stage)
redis.call('ZADD', key('deadlines'), now_ms() + queued_ms, member(group, stage))
return 'again'
