-- Append an event at the trainer step that is published; not a second time where the newest event is the same (a retry).
-- ARGV: event, then its fields: name, value, ...
local step = redis.call('HGET', key('policy'), 'step') or '0'
local newest = redis.call('XREVRANGE', key('events'), '+', '-', 'COUNT', 1)[1]
if newest and table.concat(newest[2], '\0') == table.concat({ 'event', ARGV[1], 'step', step, unpack(ARGV, 2) }, '\0') then return end
add_event(unpack(ARGV))
