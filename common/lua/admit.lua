-- Admission: hand out dataset cursors while there is credit. The caller holds the claim on each group's `task` part.
-- ARGV: most groups, max_in_flight, max_bytes, groups the whole run needs (0 = no end), lease_ms, holder
-- Returns {reason it stopped, policy version, cursor, cursor, ...}
local most, bound, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local total, lease_ms, holder = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local version = redis.call('HGET', key('policy'), 'version')

if not version then return { 'no_policy', -1 } end
if redis.call('HGET', key('run'), 'paused') then return { 'paused', tonumber(version) } end
if tonumber(redis.call('GET', key('bytes')) or '0') >= max_bytes then return { 'max_bytes', tonumber(version) } end

local reason = 'most'
local free = bound - redis.call('SCARD', key('credit'))
if free < most then most, reason = free, 'no_credit' end
if total > 0 then
  local trained = tonumber(redis.call('HGET', key('counts:train'), 'trained') or '0')
  local needed = total - trained - redis.call('SCARD', key('live:train'))
  if needed < most then most, reason = needed, 'run_complete' end
end

local out = { reason, tonumber(version) }
local deadline, seconds = now_ms() + lease_ms, now_s()
for _ = 1, most do
  local cursor = redis.call('INCR', key('cursor')) - 1
  local group = 't' .. cursor
  redis.call('SADD', key('live:train'), group)
  redis.call('SADD', key('credit'), group)
  redis.call('HINCRBY', key('counts:train'), 'admitted', 1)
  redis.call('HSET', key('g:' .. group), 'kind', 'train', 'stage', 'admitted', 'cursor', cursor, 'min_version', version,
    'n:task', 1, 'by:task', holder, 't:admitted', seconds)
  redis.call('ZADD', key('deadlines'), deadline, member(group, 'task'))
  out[#out + 1] = cursor
end
return out
