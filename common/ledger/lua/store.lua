-- A finished stage arrives. The first result of a stage wins, whichever attempt it came from; a later one is refused.
-- ARGV: group, stage, payload, policy version ('' unless stage is rollout), queued_ms, stages that follow this one,
--       stages that a complete group has (comma-separated), generated tokens,
--       groups per step, and '' or, where the rewards say that the group teaches nothing, how many such may be dropped per batch
-- Returns {'refused'} | {'stored', stage to send, ...} | {'waiting'} | {'ready'} | {'scored'} | {'dropped'}
local group, stage, payload, version = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local queued_ms, following, complete = tonumber(ARGV[5]), split(ARGV[6]), split(ARGV[7])
local g, pending = key('g:' .. group), member(group, stage)

if not redis.call('ZSCORE', key('deadlines'), pending) then
  local kind = string.sub(group, 1, 1) == 'e' and 'eval' or 'train'
  redis.call('HINCRBY', key('counts:' .. kind), 'refused', 1)
  return { 'refused' }
end

-- Counted until the next batch is taken, and bounded for it and each whole batch that is ready: no waste without an end.
if ARGV[10] ~= '' and redis.call('HGET', g, 'kind') == 'train' then
  local bound = tonumber(ARGV[10]) * (1 + math.floor(num_unread() / tonumber(ARGV[9])))
  if tonumber(redis.call('GET', key('filtered')) or '0') < bound then
    redis.call('INCR', key('filtered'))
    settle(group, 'train', 'dropped:zero_variance')
    return { 'dropped' }
  end
  redis.call('HINCRBY', key('counts:train'), 'kept_for_bound', 1)
end

redis.call('ZREM', key('deadlines'), pending)
redis.call('HSET', g, stage, payload, 't:' .. stage, now_s())
local holder = redis.call('HGET', g, 'by:' .. stage)
if holder then redis.call('HSET', g, 'w:' .. stage, holder) end
redis.call('HDEL', g, 'by:' .. stage)
redis.call('HINCRBY', g, 'bytes', #payload)
redis.call('INCRBY', key('bytes'), #payload)
if version ~= '' then
  redis.call('HSET', g, 'version', version, 'stage', 'generated')
  redis.call('HINCRBY', key('totals'), 'generated_tokens', ARGV[8])
end

if #following > 0 then
  local deadline = now_ms() + queued_ms
  for _, name in ipairs(following) do redis.call('ZADD', key('deadlines'), deadline, member(group, name)) end
  table.insert(following, 1, 'stored')
  return following
end

for _, name in ipairs(complete) do
  if redis.call('HEXISTS', g, name) == 0 then return { 'waiting' } end
end

if redis.call('HGET', g, 'kind') == 'eval' then
  record_evaluated(redis.call('HGET', g, 'eval'), 'result:' .. group, redis.call('HGET', g, 'reward'))
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
