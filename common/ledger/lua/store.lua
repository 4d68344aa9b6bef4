-- Store the result of a stage. The first result wins, whichever attempt it came from; a later one is refused.
-- ARGV: group, stage, payload, policy version ('' unless tokens were generated), queued_ms, plan (begin_stages),
--       stage whose result an evaluation keeps, generated tokens,
--       groups per step, and '' or, for a group of zero reward variance, how many such may be dropped per batch
-- Returns {'refused'} | {'stored', stage to send, ...} | {'waiting'} | {'ready'} | {'scored'} | {'dropped'}
local group, stage, payload, version = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local queued_ms, plan, evaluated = tonumber(ARGV[5]), ARGV[6], ARGV[7]
local g, pending = key('g:' .. group), member(group, stage)

if not redis.call('ZSCORE', key('deadlines'), pending) then
  local kind = string.sub(group, 1, 1) == 'e' and 'eval' or 'train'
  redis.call('HINCRBY', key('counts:' .. kind), 'refused', 1)
  return { 'refused' }
end

-- Counted until the next batch is sampled, and bounded for it and for each full batch that is ready, so that the waste ends.
if ARGV[10] ~= '' and redis.call('HGET', g, 'kind') == 'train' then
  local bound = tonumber(ARGV[10]) * (1 + math.floor(num_unread() / tonumber(ARGV[9])))
  if tonumber(redis.call('GET', key('filtered')) or '0') < bound then
    redis.call('INCR', key('filtered'))
    settle(group, 'train', 'dropped:zero_variance')
    return { 'dropped' }
  end
  redis.call('HINCRBY', key('counts:train'), 'kept_for_bound', 1)
end

remove_pending(group, stage)
redis.call('HSET', g, stage, payload, 't:' .. stage, now_s())
local holder = redis.call('HGET', g, 'by:' .. stage)
if holder then redis.call('HSET', g, 'w:' .. stage, holder) end
redis.call('HDEL', g, 'by:' .. stage, 'p:' .. stage)
redis.call('HINCRBY', g, 'bytes', #payload)
redis.call('INCRBY', key('bytes'), #payload)
if version ~= '' then
  redis.call('HSET', g, 'version', version, 'stage', 'generated')
  redis.call('HINCRBY', key('totals'), 'generated_tokens', ARGV[8])
end

local begun = begin_stages(group, plan, now_ms() + queued_ms)
if #begun > 0 then
  table.insert(begun, 1, 'stored')
  return begun
end
if redis.call('SCARD', key('pending:' .. group)) > 0 then return { 'waiting' } end

if redis.call('HGET', g, 'kind') == 'eval' then
  record_evaluated(redis.call('HGET', g, 'eval'), 'result:' .. group, redis.call('HGET', g, evaluated))
  settle(group, 'eval', 'scored')
  return { 'scored' }
end

redis.call('HSET', g, 't:ready', now_s())
file_as_ready(group, redis.call('HGET', g, 'version'))
local want = redis.call('GET', key('want'))
if want and num_unread() >= tonumber(want) then
  redis.call('DEL', key('want'))
  redis.call('RPUSH', key('wake'), 1)
  redis.call('LTRIM', key('wake'), -1, -1)
end
return { 'ready' }
