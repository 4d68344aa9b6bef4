-- Admit groups at the next dataset cursors while there is credit. The caller holds the claim on each group's first stage.
-- ARGV: max_count groups, max_credits, max_bytes, trainer steps of the run, groups per step, lease_ms, holder, first stage
-- Returns {reason it stopped, policy version, cursor, cursor, ...}; nothing is admitted while the run is paused or drained, or has failed
local max_count, bound, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local num_steps, groups_per_step, lease_ms = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local holder, stage = ARGV[7], ARGV[8]
local version = redis.call('HGET', key('policy'), 'version')

if not version then return { 'no_policy', -1 } end
if redis.call('HGET', key('run'), 'status') == 'failed' then return { 'failed', tonumber(version) } end
for _, state in ipairs({ 'paused', 'draining' }) do
  if redis.call('HEXISTS', key('run'), state) == 1 then return { state, tonumber(version) } end
end
if tonumber(redis.call('GET', key('bytes')) or '0') >= max_bytes then return { 'max_bytes', tonumber(version) } end

local reason = 'max_count'
local held = redis.call('SCARD', key('credit'))
if bound - held < max_count then max_count, reason = bound - held, 'no_credit' end
-- what the steps still to be published need; a group keeps its credit until its step is published
local needed = (num_steps - tonumber(redis.call('HGET', key('policy'), 'step'))) * groups_per_step - held
if needed < max_count then max_count, reason = needed, 'run_complete' end

local out = { reason, tonumber(version) }
local deadline, seconds = now_ms() + lease_ms, now_s()
for _ = 1, max_count do
  local cursor
  repeat cursor = redis.call('INCR', key('cursor')) - 1 until redis.call('SREM', key('ahead'), 't' .. cursor) == 0
  local group = 't' .. cursor
  redis.call('SADD', key('live:train'), group)
  redis.call('SADD', key('credit'), group)
  redis.call('HINCRBY', key('counts:train'), 'admitted', 1)
  redis.call('HSET', key('g:' .. group), 'kind', 'train', 'stage', 'admitted', 'cursor', cursor, 'min_version', version,
    'n:' .. stage, 1, 'by:' .. stage, holder, 't:admitted', seconds)
  make_pending(group, stage, deadline)
  out[#out + 1] = cursor
end
return out
