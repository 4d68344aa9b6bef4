-- Claim one stage of a group for a worker. A Celery message is only a hint; this decides.
-- `holder` names the worker and this one claim, so that a message delivered twice to one worker runs once.
-- ARGV: group, stage, holder, lease_ms, field of the group to return, ...
-- Returns {1, attempt, field values...} or {0, reason}
local group, stage, me, lease_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local g, pending = key('g:' .. group), member(group, stage)

local deadline = redis.call('ZSCORE', key('deadlines'), pending)
if not deadline then return { 0, 'not_pending' } end
local holder = redis.call('HGET', g, 'by:' .. stage)
local now = now_ms()
if holder and holder ~= me and tonumber(deadline) > now then return { 0, 'held_by ' .. holder } end

if holder and holder ~= me and holder ~= 'retry' then lose_claim(group, redis.call('HGET', g, 'kind'), stage) end
-- the same claim again means that its reply was lost: it spends no second attempt
local attempt = holder == me and tonumber(redis.call('HGET', g, 'n:' .. stage)) or redis.call('HINCRBY', g, 'n:' .. stage, 1)
redis.call('HSET', g, 'by:' .. stage, me, 't:' .. stage .. '_started', now_s())
redis.call('ZADD', key('deadlines'), now + lease_ms, pending)
local out = { 1, attempt }
for i = 5, #ARGV do out[#out + 1] = redis.call('HGET', g, ARGV[i]) or false end
return out
