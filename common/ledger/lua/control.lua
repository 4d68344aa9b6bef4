-- Change the control state of a run (paused, draining) and its settings. All or nothing.
-- ARGV: who, number of settings that the caller has read (-1 = not relevant), these as key, value, ...; then per change:
--       state | setting, field, value ('' = remove), and for the change log: key, old, new
-- Returns {'done', changes made} (not counting what is so already) | {'moved'} (the settings differ from those read: retry)
--       | {'refused', status} (the run has finished or was deleted)
local who, num_seen = ARGV[1], tonumber(ARGV[2])
local status = redis.call('HGET', key('run'), 'status') or ''
if status == '' or status == 'finished' or status == 'deleting' then return { 'refused', status } end

local first = 3 + 2 * math.max(num_seen, 0)
if num_seen >= 0 and redis.call('HLEN', key('settings')) ~= num_seen then return { 'moved' } end
for i = 3, first - 1, 2 do
  if redis.call('HGET', key('settings'), ARGV[i]) ~= ARGV[i + 1] then return { 'moved' } end
end

local step, changed = redis.call('HGET', key('policy'), 'step') or '0', 0
for i = first, #ARGV, 6 do
  local is_state, field, value = ARGV[i] == 'state', ARGV[i + 1], ARGV[i + 2]
  local place = key(is_state and 'run' or 'settings')
  local held = redis.call('HGET', place, field) or ''
  -- a run that is paused already keeps who paused it first
  local is_same = held == value or (is_state and held ~= '' and value ~= '')
  if not is_same then
    if value == '' then redis.call('HDEL', place, field) else redis.call('HSET', place, field, value) end
    redis.call('XADD', key('controls'), 'MAXLEN', '~', '1000', '*', 'at', now_s(), 'who', who, 'step', step,
      'key', ARGV[i + 3], 'old', ARGV[i + 4], 'new', ARGV[i + 5])
    add_event('setting', 'who', who, 'key', ARGV[i + 3], 'old', ARGV[i + 4], 'new', ARGV[i + 5])
    changed = changed + 1
  end
end
return { 'done', changed }
