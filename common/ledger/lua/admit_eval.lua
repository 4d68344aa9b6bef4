-- Admit the groups of an evaluation of one version on one dataset, under kind `eval`: they never enter the buffer.
-- ARGV: evaluation id, dataset, version, queued_ms, plan (begin_stages), first stage, then group, its result, ...
-- Returns {group, stage, group, stage, ...} to send. A second call (the message was delivered twice) admits only what is
-- missing: nothing once all results are folded (fold_eval.lua).
local id, dataset, version, queued_ms, plan, stage = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local evaluation = key('eval:' .. id)
if redis.call('HEXISTS', evaluation, 'summary') == 1 then return {} end
local out, seconds = {}, now_s()
redis.call('HSET', evaluation, 'dataset', dataset, 'version', version, 'total', (#ARGV - 6) / 2)
if #ARGV == 6 then redis.call('HDEL', key('evaluations'), id) end -- no prompt can be used: it is finished already
for i = 7, #ARGV, 2 do
  local group, payload = ARGV[i], ARGV[i + 1]
  if redis.call('HSETNX', evaluation, 'admitted:' .. group, 1) == 1 then
    redis.call('SADD', key('live:eval'), group)
    redis.call('HINCRBY', key('counts:eval'), 'admitted', 1)
    redis.call('HSET', key('g:' .. group), 'kind', 'eval', 'stage', 'admitted', 'eval', id, 'min_version', version,
      'pinned', version, stage, payload, 'bytes', #payload, 't:admitted', seconds)
    redis.call('INCRBY', key('bytes'), #payload)
    for _, begun in ipairs(begin_stages(group, plan, now_ms() + queued_ms)) do
      out[#out + 1] = group
      out[#out + 1] = begun
    end
  end
end
return out
