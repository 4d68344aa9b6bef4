-- Put in front of every script: the keys, and the few operations that all transitions share.
-- KEYS[1] is the run's root, `sluice:{run}:`; the braces keep all keys of a run in one cluster slot.
--
--   run                hash     config, assets, status, created_at, incarnation; mark of the batch dealt out last;
--                               paused, draining: JSON {who, at} while an operator holds or ends the run
--   settings           hash     key of the config -> JSON, where an operator has set another value than the stored one
--   controls           stream   capped; what operators did: at, who, step, key, old, new
--   cursor             string   next dataset cursor
--   ahead              set      groups beyond the cursor that are settled already (Redis lost their admission, see acknowledge)
--   counts:<kind>      hash     admitted, trained, scored, dropped:<reason>, dead:<reason>, retried, refused, resent, reconciled,
--                               kept_for_bound; kind = train | eval
--   settled            hash     trainer step -> groups that its acknowledgement settled as trained
--   totals             hash     generated_tokens, of every stored rollout
--   live:<kind>        set      groups admitted and not yet settled: the ledger's in_flight
--   credit             set      training groups that hold an admission credit
--   g:<group>          hash     kind, stage, cursor, min_version, pinned, version, samples, bytes, eval,
--                               payloads task|rollout|reward|reference, and per stage: n:<stage> claims, by:<stage> worker,
--                               w:<stage> who did it,
--                               s:<stage> times sent again; t:<stage> seconds
--   deadlines          zset     "<group>|<stage>" -> ms: every stage somebody owes us
--   stream:<version>   stream   groups ready for training, filed under their oldest version; consumer group `trainer`
--   versions           zset     versions that have a stream
--   batch:<step>       list     manifest of a trainer step: "<version>|<entry>|<group>"
--   batches            zset     steps that have a manifest
--   want, wake         string, list: the trainer waits for `want` ready groups with BLPOP wake
--   filtered           string   groups dropped for equal rewards since the last batch was taken
--   readers            zset     "<version>|<reader>" -> ms until which a process that fetches a version keeps it
--   processes          zset     process -> ms of its last heartbeat; process:<process> string: its facts, with a time to live
--   policy             hash     the pointer: version, digest, step, incarnation, bytes, published_at
--   wanted_whole       string   the version that a reader last failed to verify
--   lineage            hash     version -> "<parent>:<trainer step>", once published "<parent>:<trainer step>:<digest>"
--   events             stream   capped; policy published, dead letters, scaled (queue, from, to, reason), ...
--   autoscale          hash     queue -> JSON {desired, have, min, max, reason, at, since, ...} (common/operations/autoscale.py)
--   bytes              string   payload bytes held by groups
--   dead               zset     dead-lettered groups -> ms; their hash is kept
--   evaluations        hash     id -> version: evaluations asked for and not finished; their versions are kept
--   eval:<id>          hash     one evaluation: dataset, version, total, done; admitted:<group>, and result:<group> or
--                               dead:<group>; when all are in, summary instead of admitted: and result: (fold_eval.lua);
--                               reported: its result is in the metrics
--
-- Every script is atomic and idempotent: a second call with the same arguments changes nothing. A failed script is not
-- rolled back, so scripts check first and write after.
--
-- At `maxmemory` Redis refuses a write that may need memory if it is the first one of a script, and none after it. What
-- brings payloads in, and what begins work, asks first and is refused as a whole; everything else must go on, or nothing
-- would ever be freed (common/ledger/scripts.py says which is which).

local root = KEYS[1]

local function key(name) return root .. name end

-- An empty write: changes nothing, is not replicated, and is refused at maxmemory.
local function refuse_when_full() redis.call('SETRANGE', key('full'), 0, '') end

-- A first write that needs no memory opens the way for all others of this script.
local function write_when_full() redis.call('DEL', key('full')) end

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function now_s()
  local t = redis.call('TIME')
  return string.format('%d.%06d', t[1], t[2])
end

local function member(group, stage) return group .. '|' .. stage end

local function split(text)
  local out = {}
  for word in string.gmatch(text, '[^,]+') do out[#out + 1] = word end
  return out
end

-- Age of version v seen from cur, in optimizer steps: the distance through their fork. 1e9 when v is not in the lineage.
local function policy_age(v, cur)
  local function node(version)
    local value = redis.call('HGET', key('lineage'), version)
    if not value then return nil end
    local parent, step = string.match(value, '^(%-?%d+):(%d+)')
    return { version = tonumber(version), parent = tonumber(parent), step = tonumber(step) }
  end
  local from, to = node(v), node(cur)
  if not from or not to then return 1e9 end
  local a, b = from, to
  while a.version ~= b.version do
    if a.version > b.version then a = node(a.parent) else b = node(b.parent) end
    if not a or not b then return 1e9 end
  end
  return (from.step - a.step) + (to.step - a.step)
end

-- One group of an evaluation is settled; the last one releases the evaluation's policy version.
local function record_evaluated(id, field, value)
  local evaluation = key('eval:' .. id)
  redis.call('HSET', evaluation, field, value)
  if redis.call('HINCRBY', evaluation, 'done', 1) == tonumber(redis.call('HGET', evaluation, 'total')) then
    redis.call('HDEL', key('evaluations'), id)
  end
end

-- Remove every trace of work still pending for a group.
local function forget_work(group)
  for _, stage in ipairs({ 'task', 'rollout', 'reward', 'reference' }) do
    redis.call('ZREM', key('deadlines'), member(group, stage))
  end
  redis.call('SREM', key('credit'), group)
end

-- A group leaves the ledger's in_flight under `outcome`, once, and its payload is freed.
local function settle(group, kind, outcome)
  if redis.call('SREM', key('live:' .. kind), group) == 0 then return 0 end
  redis.call('HINCRBY', key('counts:' .. kind), outcome, 1)
  forget_work(group)
  local bytes = tonumber(redis.call('HGET', key('g:' .. group), 'bytes') or '0')
  if bytes > 0 then redis.call('DECRBY', key('bytes'), bytes) end
  redis.call('UNLINK', key('g:' .. group))
  return 1
end

-- As settle, but the payload stays for `sluice dead`.
local function dead_letter(group, kind, reason, detail, worker)
  if redis.call('SREM', key('live:' .. kind), group) == 0 then return 0 end
  redis.call('HINCRBY', key('counts:' .. kind), 'dead:' .. reason, 1)
  forget_work(group)
  redis.call('ZADD', key('dead'), now_ms(), group)
  redis.call('HSET', key('g:' .. group), 'stage', 'dead', 'dead_reason', reason, 'dead_detail', detail, 'dead_worker', worker)
  redis.call('XADD', key('events'), 'MAXLEN', '~', '1000', '*', 'event', 'dead', 'group', group, 'reason', reason)
  local id = redis.call('HGET', key('g:' .. group), 'eval')
  if id then record_evaluated(id, 'dead:' .. group, reason) end
  return 1
end

-- Groups in the buffer that no batch holds.
local function unread(version)
  local stream = key('stream:' .. version)
  if redis.call('EXISTS', stream) == 0 then return 0 end
  return redis.call('XLEN', stream) - redis.call('XPENDING', stream, 'trainer')[1]
end

local function num_unread()
  local count = 0
  for _, version in ipairs(redis.call('ZRANGE', key('versions'), 0, -1)) do count = count + unread(version) end
  return count
end

local function file_as_ready(group, version)
  local stream = key('stream:' .. version)
  if redis.call('EXISTS', stream) == 0 then
    redis.call('XGROUP', 'CREATE', stream, 'trainer', '0', 'MKSTREAM')
    redis.call('ZADD', key('versions'), version, version)
  end
  redis.call('XADD', stream, '*', 'group', group)
  redis.call('HSET', key('g:' .. group), 'stage', 'ready')
end

local function discard_if_empty(version)
  local stream = key('stream:' .. version)
  if redis.call('XLEN', stream) == 0 then
    redis.call('DEL', stream)
    redis.call('ZREM', key('versions'), version)
  end
end

-- An entry of the buffer that a batch holds goes back to the unread ones: it was not trained after all.
local function give_back(group, version, entry)
  redis.call('XACK', key('stream:' .. version), 'trainer', entry)
  redis.call('XDEL', key('stream:' .. version), entry)
  if redis.call('HINCRBY', key('g:' .. group), 'samples', -1) <= 0 then redis.call('HDEL', key('g:' .. group), 'samples') end
  file_as_ready(group, version)
end

-- Lines of a manifest as {version, entry, group}.
local function batch_lines(step)
  local out = {}
  for _, line in ipairs(redis.call('LRANGE', key('batch:' .. step), 0, -1)) do
    local version, entry, group = string.match(line, '^(%d+)|([^|]+)|(.+)$')
    out[#out + 1] = { version = version, entry = entry, group = group }
  end
  return out
end

local function forget_batch(step)
  redis.call('DEL', key('batch:' .. step))
  redis.call('ZREM', key('batches'), step)
end

-- Take up to `count` unread entries of a version's stream: list of {entry id, group}.
local function read_entries(version, count)
  local reply = redis.call('XREADGROUP', 'GROUP', 'trainer', 'trainer', 'COUNT', count, 'STREAMS', key('stream:' .. version), '>')
  local out = {}
  if not reply then return out end
  local streams = reply[1]
  if not streams then return out end
  for _, entry in ipairs(streams[2]) do out[#out + 1] = { entry[1], entry[2][2] } end
  return out
end
