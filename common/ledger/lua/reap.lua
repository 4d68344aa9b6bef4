-- Send overdue stages again. One that a worker held (it died, hung or lost its network) spends an attempt; one that no worker
-- claimed (its message was lost, or the queue is long) does not, and waits twice as long each time.
-- ARGV: max_attempts, queued_ms, max_count stages
-- Returns {group, stage, kind, group, stage, kind, ...} to send
local max_attempts, queued_ms = tonumber(ARGV[1]), tonumber(ARGV[2])
local now = now_ms()
local out = {}
for _, pending in ipairs(redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', now, 'LIMIT', 0, ARGV[3])) do
  local group, stage = string.match(pending, '^(.+)|([^|]+)$')
  local g = key('g:' .. group)
  local kind, holder = redis.call('HGET', g, 'kind'), redis.call('HGET', g, 'by:' .. stage)
  if not redis.call('ZSCORE', key('deadlines'), pending) then
    -- its group has just been dead-lettered for another stage
  elseif not kind then
    remove_pending(group, stage)
  elseif holder and tonumber(redis.call('HGET', g, 'n:' .. stage)) >= max_attempts then
    local last = redis.call('HGET', g, 'last_error') or 'no error was reported'
    dead_letter(group, kind, 'lease_expired', stage .. ' held by ' .. holder .. ' was not renewed; before that: ' .. last, holder)
  else
    local wait = queued_ms
    if holder then
      redis.call('HDEL', g, 'by:' .. stage)
      redis.call('HINCRBY', key('counts:' .. kind), 'retried', 1)
    else
      local sends = redis.call('HINCRBY', g, 's:' .. stage, 1)
      redis.call('HINCRBY', key('counts:' .. kind), 'resent', 1)
      wait = queued_ms * 2 ^ math.min(sends, 6)
    end
    redis.call('ZADD', key('deadlines'), now + wait, pending)
    out[#out + 1] = group
    out[#out + 1] = stage
    out[#out + 1] = kind
  end
end
return out
