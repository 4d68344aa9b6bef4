-- A worker cannot finish a stage: `failed` spends an attempt, and the next one waits; `released` (shutdown) does neither.
-- ARGV: mode failed|released, group, stage, holder, reason, detail, max_attempts, queued_ms, max_dead_bytes,
--       ms to wait after the first attempt, after the second, ... (the last one stands for all later ones)
-- Returns 'refused' | 'again' (send the stage now) | 'waits' (the reaper sends it) | 'dead'
local mode, group, stage, holder = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local reason, detail, max_attempts, queued_ms = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local g = key('g:' .. group)

if redis.call('HGET', g, 'by:' .. stage) ~= holder or not redis.call('ZSCORE', key('deadlines'), member(group, stage)) then
  return 'refused'
end
local kind, attempts = redis.call('HGET', g, 'kind'), tonumber(redis.call('HGET', g, 'n:' .. stage))
redis.call('HDEL', g, 'p:' .. stage)
if mode == 'released' then
  redis.call('HINCRBY', g, 'n:' .. stage, -1)
  redis.call('HDEL', g, 'by:' .. stage)
  redis.call('ZADD', key('deadlines'), now_ms() + queued_ms, member(group, stage))
  return 'again'
end
if attempts >= max_attempts then
  dead_letter(group, kind, reason, detail, holder, ARGV[9])
  return 'dead'
end
redis.call('HINCRBY', key('counts:' .. kind), 'retried', 1)
-- Held by no worker until the wait is over, so that a message delivered twice does not shorten it.
redis.call('HSET', g, 'by:' .. stage, 'retry', 'last_error', reason .. ': ' .. detail)
redis.call('ZADD', key('deadlines'), now_ms() + tonumber(ARGV[math.min(9 + attempts, #ARGV)]), member(group, stage))
return 'waits'
