-- Send overdue stages again. A claim that was lost (its worker died, hung or lost its network) spends an attempt, unless it had
-- made progress; a stage that waited to be tried again, or that no worker claimed (its message was lost, or the queue is long),
-- spends none, and the latter waits twice as long each time.
-- ARGV: max_attempts, max_interruptions, queued_ms, max_dead_bytes, max_count stages
-- Returns {group, stage, kind, group, stage, kind, ...} to send
local max_attempts, max_interruptions, queued_ms = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local out = {}

-- Why a stage may not be tried again: reason and detail, or nil.
local function ends(g, stage, holder)
  local attempts, interruptions, progress = unpack(redis.call('HMGET', g, 'n:' .. stage, 'i:' .. stage, 'p:' .. stage))
  local last = redis.call('HGET', g, 'last_error') or 'no error was reported'
  local lost = stage .. ' held by ' .. holder .. ' was not renewed'
  if progress and tonumber(interruptions or '0') + 1 >= max_interruptions then
    return 'interrupted', lost .. ', like ' .. max_interruptions - 1 .. ' claims before it, after progress; before that: ' .. last
  end
  if not progress and tonumber(attempts) >= max_attempts then return 'lease_expired', lost .. '; before that: ' .. last end
end

for _, pending in ipairs(redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', now, 'LIMIT', 0, ARGV[5])) do
  local group, stage = string.match(pending, '^(.+)|([^|]+)$')
  local g = key('g:' .. group)
  local kind, holder = unpack(redis.call('HMGET', g, 'kind', 'by:' .. stage))
  local is_held = holder and holder ~= 'retry'
  local reason, detail
  if is_held then reason, detail = ends(g, stage, holder) end
  if not redis.call('ZSCORE', key('deadlines'), pending) then
    -- its group has just been dead-lettered for another stage
  elseif not kind then
    remove_pending(group, stage)
  elseif reason then
    dead_letter(group, kind, reason, detail, holder, ARGV[4])
  else
    local wait = queued_ms
    if is_held then
      lose_claim(group, kind, stage)
    elseif holder then
      redis.call('HDEL', g, 'by:' .. stage)
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
