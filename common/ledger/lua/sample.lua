-- Evict stale groups, then sample k complete groups for a trainer step, oldest version first, or none.
-- ARGV: step, k, current policy version, max_policy_age, newest version that this trainer has seen published,
--       mark of its last batch ('' = none yet), mark of this one
-- Returns {evicted, available, group, group, ...}; with fewer than k available no groups, and the trainer is woken at k;
-- {-1, 0} when Redis has lost writes of this trainer (it was restarted, or a replica was promoted)
local step, k, current, max_age = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local published, last_mark, new_mark = tonumber(ARGV[5]), ARGV[6], ARGV[7]

-- Redis must know the last batch, the current version and the newest publication of this trainer; a reply that was lost leaves
-- the new mark instead of the last one.
local function is_behind()
  local mark = redis.call('HGET', key('run'), 'mark')
  if last_mark ~= '' and mark ~= last_mark and mark ~= new_mark then return true end
  return redis.call('HEXISTS', key('lineage'), current) == 0
    or tonumber(redis.call('HGET', key('policy'), 'version') or '-1') < published
end

local function is_stale(version) return policy_age(version, current) > max_age end

if is_behind() then return { -1, 0 } end

-- The same step returns the same groups as long as its manifest exists and none of them is stale.
local evicted, available, fresh = 0, 0, {}
local held, is_too_old = batch_lines(step), false
for _, line in ipairs(held) do is_too_old = is_too_old or is_stale(line.version) end
if #held > 0 and not is_too_old then
  local out = { 0, k }
  for _, line in ipairs(held) do out[#out + 1] = line.group end
  redis.call('HSET', key('run'), 'mark', new_mark)
  return out
end
-- Seen from another branch, after a roll-back, a manifest may hold a stale group: it and all later ones are dissolved.
if is_too_old then dissolve_from(step) end

-- Only unread entries are read, so no group of an earlier batch is evicted: it stays with its manifest.
for _, version in ipairs(redis.call('ZRANGE', key('versions'), 0, -1)) do
  if not has_stream(version) then
    -- its groups are found by `recover`
  elseif is_stale(version) then
    local entries = read_entries(version, 1000)
    while #entries > 0 do
      for _, entry in ipairs(entries) do
        redis.call('XACK', key('stream:' .. version), 'trainer', entry[1])
        redis.call('XDEL', key('stream:' .. version), entry[1])
        -- a group trained before and kept for resampling counts as trained
        if redis.call('HGET', key('g:' .. entry[2]), 'samples') then
          settle(entry[2], 'train', 'trained')
        else
          evicted = evicted + settle(entry[2], 'train', 'dropped:stale')
        end
      end
      entries = read_entries(version, 1000)
    end
    discard_if_empty(version)
  else
    fresh[#fresh + 1] = version
    available = available + unread(version)
  end
end
-- All or nothing: below k no entry is read, and the store that makes the k-th group ready pushes `wake`.
local out = { evicted, available }
if available < k then
  redis.call('SET', key('want'), k)
  return out
end

-- Every entry read is in the manifest, with its sample counted, before the reply is sent.
local seconds, missing = now_s(), k
for _, version in ipairs(fresh) do
  if missing == 0 then break end
  for _, entry in ipairs(read_entries(version, missing)) do
    local group = entry[2]
    redis.call('RPUSH', key('batch:' .. step), version .. '|' .. entry[1] .. '|' .. group)
    redis.call('HSET', key('g:' .. group), 'stage', 'leased', 't:leased', seconds)
    redis.call('HINCRBY', key('g:' .. group), 'samples', 1)
    out[#out + 1] = group
    missing = missing - 1
  end
end
redis.call('ZADD', key('batches'), step, step)
redis.call('HSET', key('run'), 'mark', new_mark)
redis.call('DEL', key('want'), key('wake'), key('filtered'))
return out
