-- Prepended to every script: the keys, and the operations that all transitions share.
-- KEYS[1] is the run's root, `sluice:{run}:`; the braces keep all keys of a run in one cluster slot.
--
--   run                hash     config, assets, status, failure, created_at, incarnation; mark of the last sampled batch;
--                               paused, draining: JSON {who, at} while an operator holds or ends the run
--   settings           hash     key of the config -> JSON, where an operator has changed the stored value
--   controls           stream   capped; the change log of operators: at, who, step, key, old, new
--   cursor             string   next dataset cursor
--   ahead              set      settled groups beyond the cursor (Redis lost their admission, see acknowledge)
--   counts:<kind>      hash     admitted, trained, scored, dropped:<reason>, dead:<reason>, retried, interrupted, refused, resent,
--                               reconciled, recovered, discarded, kept_for_bound; kind = train | eval
--   settled            hash     trainer step -> groups that its acknowledgement settled as trained
--   totals             hash     generated_tokens, of every stored rollout
--   live:<kind>        set      groups admitted and not yet settled: the ledger's in_flight
--   credit             set      training groups that hold an admission credit
--   g:<group>          hash     kind, stage, cursor, min_version, pinned, version, entry (in its stream), samples, bytes, eval,
--                               <stage>: its result, and per stage of common/pipeline.py n:<stage> attempts, by:<stage> holder
--                               (`retry` while it waits to be tried again), p:<stage> progress of its running claim,
--                               i:<stage> claims lost after progress, w:<stage> who finished it, s:<stage> times resent,
--                               t:<stage> and t:<stage>_started seconds
--   pending:<group>    set      pending stages of a group; added and removed together with their deadlines
--   deadlines          zset     "<group>|<stage>" -> ms: lease or resend deadline of every pending stage
--   stream:<version>   stream   groups ready for training, by the oldest version of their tokens; consumer group `trainer`
--   versions           zset     versions that have a stream
--   batch:<step>       list     manifest of a trainer step: "<version>|<entry>|<group>"
--   batches            zset     steps that have a manifest
--   want, wake         string, list: the trainer waits for `want` ready groups with BLPOP wake
--   filtered           string   groups dropped for zero reward variance since the last batch was sampled
--   ends               list     how the newest training groups ended their way to the trainer, newest first: '' = complete,
--                               else the reason for which one was lost
--   lost               hash     groups lost in a row: dead, dropped, attempts that failed (since a group was complete),
--                               undecodable (all since a step was published); reason, detail, group of the last one;
--                               rows of an epoch of the dataset
--   readers            zset     "<version>|<reader>" -> ms until which a version is kept for a process that fetches it
--   processes          zset     process -> ms of its last heartbeat
--   process:<process>  string   its stats, with a time to live
--   tick               string   the dataset worker that ticks, for a second
--   policy             hash     the pointer: version, digest, step, incarnation, bytes, published_at; confirmed: the trainer's
--                               signature of version and digest, renewed (common/policies/signing.py)
--   manifests          hash     version -> its manifest, signed where the run has a key
--   weights:<version>  string   size of a version's weights on the Redis transport; chunks at weights:<version>:<i>
--   delta:<version>    string   the same for its delta on an earlier version
--   full_requested     string   the version that a reader last failed to verify
--   lineage            hash     version -> "<parent>:<trainer step>", once published "<parent>:<trainer step>:<digest>"
--   publications       stream   capped; version: of a policy that was published; wakes the workers that load it
--   events             stream   capped; what happened to the run as a whole: event, step, and by event: killed | ended (process,
--                               how), restarted (process), checkpoint, setting (who, key, old, new), scaled (queue, from, to, reason)
--   metrics            stream   capped; one entry per trainer step: metric -> number
--   samples            stream   capped; sample: a trained group, for display
--   autoscale          hash     queue -> JSON {desired, have, min, max, reason, at, since, ...} (common/monitoring/autoscale.py)
--   bytes              string   payload bytes held by groups in flight
--   dead               zset     dead-lettered groups -> ms; their hash is kept until they are discarded
--   dead_bytes         string   bytes held by dead letters
--   evaluations        hash     id -> version: evaluations requested and not finished; their versions are kept
--   eval:<id>          hash     one evaluation: dataset, version, total, done; admitted:<group>, and result:<group> or
--                               dead:<group>; once finished, summary instead of admitted: and result: (fold_eval.lua);
--                               reported: its result is in the metrics
--   mq:<queue>         list     Celery's messages; other keys under mq: are Celery's own
--   mq:rejected        list     the newest elements that were not messages (common/connections/transport.py)
--
-- Every script is atomic and idempotent: a second call with the same arguments changes nothing. A failed script is not
-- rolled back, so scripts check first and write after.
--
-- At `maxmemory` Redis refuses a write that may need memory if it is the first one of a script, and none after it. Scripts
-- that store payloads or begin work check first and are refused entirely; all others must work, or memory would never be freed
-- (common/ledger/scripts.py lists them).

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

-- Append an event at the trainer step that is published.
local function add_event(event, ...)
  local step = redis.call('HGET', key('policy'), 'step') or '0'
  redis.call('XADD', key('events'), 'MAXLEN', '~', '2000', '*', 'event', event, 'step', step, ...)
end

local function member(group, stage) return group .. '|' .. stage end

-- Age of version v seen from cur, in optimizer steps: the distance through their fork. 1e9 when v is not in the lineage.
local function policy_age(v, cur)
  local function node(version)
    local value = redis.call('HGET', key('lineage'), version)
    if not value then return nil end
    local parent, step = string.match(value, '^(%-?%d+):(%d+)')
    if not parent or tonumber(parent) >= tonumber(version) then return nil end
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

-- Record a settled group of an evaluation; the last one releases the evaluation's policy version.
local function record_evaluated(id, field, value)
  local evaluation = key('eval:' .. id)
  redis.call('HSET', evaluation, field, value)
  if redis.call('HINCRBY', evaluation, 'done', 1) == tonumber(redis.call('HGET', evaluation, 'total')) then
    redis.call('HDEL', key('evaluations'), id)
  end
end

-- Make a stage of a group pending, due at `deadline` (ms). Returns false, and leaves the deadline, if it was pending before.
local function make_pending(group, stage, deadline)
  if redis.call('SADD', key('pending:' .. group), stage) == 0 then return false end
  redis.call('ZADD', key('deadlines'), deadline, member(group, stage))
  return true
end

local function remove_pending(group, stage)
  redis.call('SREM', key('pending:' .. group), stage)
  redis.call('ZREM', key('deadlines'), member(group, stage))
end

-- Remove all pending work of a group.
local function forget_work(group)
  for _, stage in ipairs(redis.call('SMEMBERS', key('pending:' .. group))) do
    redis.call('ZREM', key('deadlines'), member(group, stage))
  end
  redis.call('DEL', key('pending:' .. group))
  redis.call('SREM', key('credit'), group)
end

-- Make every stage pending that is not stored while all that it waits for is. Returns those that were not pending before.
-- plan: every stage of the group with what it waits for, "task< rollout<task judge<rollout,reward".
local function begin_stages(group, plan, deadline)
  local g, begun = key('g:' .. group), {}
  for stage, needs in string.gmatch(plan, '([^ <]+)<([^ ]*)') do
    local can_begin = redis.call('HEXISTS', g, stage) == 0
    for need in string.gmatch(needs, '[^,]+') do can_begin = can_begin and redis.call('HEXISTS', g, need) == 1 end
    if can_begin and make_pending(group, stage, deadline) then begun[#begun + 1] = stage end
  end
  return begun
end

-- Count a loss, or an attempt that failed, and keep the newest reason.
local function note_failure(reason, count, detail, group)
  redis.call('HINCRBY', key('lost'), count, 1)
  redis.call('HSET', key('lost'), 'reason', reason, 'detail', detail, 'group', group)
end

-- Note how a training group ended its way to the trainer: reason '' = it is complete, else it was lost and `count` of `lost` grows.
local function note_end(reason, count, detail, group)
  redis.call('LPUSH', key('ends'), reason)
  redis.call('LTRIM', key('ends'), 0, 255)
  if reason == '' then return redis.call('HDEL', key('lost'), 'dead', 'dropped', 'failed') end
  note_failure(reason, count, detail, group)
end

-- Settle a group in flight under `outcome`, once, and free its payload. Returns the number of groups settled.
local function settle(group, kind, outcome)
  if redis.call('SREM', key('live:' .. kind), group) == 0 then return 0 end
  redis.call('HINCRBY', key('counts:' .. kind), outcome, 1)
  forget_work(group)
  local bytes = tonumber(redis.call('HGET', key('g:' .. group), 'bytes') or '0')
  if bytes > 0 then redis.call('DECRBY', key('bytes'), bytes) end
  redis.call('UNLINK', key('g:' .. group))
  return 1
end

-- Bytes of a dead letter: its payload, its traceback, and about what the rest of its record takes.
local function letter_bytes(group)
  local g = key('g:' .. group)
  return 1024 + tonumber(redis.call('HGET', g, 'bytes') or '0') + redis.call('HSTRLEN', g, 'dead_detail')
end

-- Remove a dead letter; its group stays counted as dead. Returns the number of letters removed.
local function discard(group)
  if redis.call('ZREM', key('dead'), group) == 0 then return 0 end
  redis.call('DECRBY', key('dead_bytes'), letter_bytes(group))
  redis.call('HINCRBY', key('counts:' .. (redis.call('HGET', key('g:' .. group), 'kind') or 'train')), 'discarded', 1)
  redis.call('UNLINK', key('g:' .. group))
  return 1
end

-- As settle, but the payload is kept for `sluice dead`: no more of it than max_dead_bytes, besides the newest letter.
local function dead_letter(group, kind, reason, detail, worker, max_dead_bytes)
  if redis.call('SREM', key('live:' .. kind), group) == 0 then return 0 end
  local g = key('g:' .. group)
  redis.call('HINCRBY', key('counts:' .. kind), 'dead:' .. reason, 1)
  forget_work(group)
  redis.call('DECRBY', key('bytes'), redis.call('HGET', g, 'bytes') or '0')
  redis.call('ZADD', key('dead'), now_ms(), group)
  redis.call('HSET', g, 'kind', kind, 'stage', 'dead', 'dead_reason', reason, 'dead_detail', detail, 'dead_worker', worker)
  local id = redis.call('HGET', g, 'eval')
  if id then record_evaluated(id, 'dead:' .. group, reason) end
  if kind == 'train' then note_end(reason, reason == 'undecodable' and 'undecodable' or 'dead', detail, group) end

  local held = redis.call('INCRBY', key('dead_bytes'), letter_bytes(group))
  while held > tonumber(max_dead_bytes) do
    local oldest = redis.call('ZRANGE', key('dead'), 0, 0)[1]
    if oldest == group then break end
    discard(oldest)
    held = tonumber(redis.call('GET', key('dead_bytes')))
  end
  return 1
end

-- The holder of a stage has lost it. A claim that made progress has spent no attempt, and the group has shown that it can run:
-- its attempts start again.
local function lose_claim(group, kind, stage)
  local g = key('g:' .. group)
  if redis.call('HDEL', g, 'p:' .. stage) == 1 then
    redis.call('HSET', g, 'n:' .. stage, 0)
    redis.call('HINCRBY', g, 'i:' .. stage, 1)
    redis.call('HINCRBY', key('counts:' .. kind), 'interrupted', 1)
  else
    redis.call('HINCRBY', key('counts:' .. kind), 'retried', 1)
  end
  redis.call('HDEL', g, 'by:' .. stage)
end

-- Whether a version's stream is there, with its consumer group. What is left of a damaged one is removed: `recover` finds its
-- groups. Batches that were sampled from it stay: their manifests name their groups.
local function has_stream(version)
  if not redis.pcall('XPENDING', key('stream:' .. version), 'trainer').err then return true end
  redis.call('DEL', key('stream:' .. version))
  redis.call('ZREM', key('versions'), version)
  return false
end

-- Number of groups in a version's stream that no batch holds.
local function unread(version)
  if not has_stream(version) then return 0 end
  return redis.call('XLEN', key('stream:' .. version)) - redis.call('XPENDING', key('stream:' .. version), 'trainer')[1]
end

local function num_unread()
  local count = 0
  for _, version in ipairs(redis.call('ZRANGE', key('versions'), 0, -1)) do count = count + unread(version) end
  return count
end

local function file_as_ready(group, version)
  local stream = key('stream:' .. version)
  if not has_stream(version) then
    redis.call('XGROUP', 'CREATE', stream, 'trainer', '0', 'MKSTREAM')
    redis.call('ZADD', key('versions'), version, version)
  end
  redis.call('HSET', key('g:' .. group), 'stage', 'ready', 'entry', redis.call('XADD', stream, '*', 'group', group))
end

local function discard_if_empty(version)
  local stream = key('stream:' .. version)
  if redis.call('XLEN', stream) == 0 then
    redis.call('DEL', stream)
    redis.call('ZREM', key('versions'), version)
  end
end

-- Make an entry that a batch holds unread again: it was not trained.
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

-- Make all groups of a batch and of those after it unread again.
local function dissolve_from(step)
  for _, sampled in ipairs(redis.call('ZRANGEBYSCORE', key('batches'), step, '+inf')) do
    for _, line in ipairs(batch_lines(sampled)) do give_back(line.group, line.version, line.entry) end
    forget_batch(sampled)
  end
end

-- Remove the unread entry of a ready group.
local function remove_from_buffer(group)
  if redis.call('HGET', key('g:' .. group), 'stage') ~= 'ready' then return end
  local version, entry = unpack(redis.call('HMGET', key('g:' .. group), 'version', 'entry'))
  redis.call('XDEL', key('stream:' .. version), entry)
  discard_if_empty(version)
end

-- Read up to `count` unread entries of a version's stream, which a batch holds from now on: list of {entry id, group}.
local function read_entries(version, count)
  local reply = redis.call('XREADGROUP', 'GROUP', 'trainer', 'trainer', 'COUNT', count, 'STREAMS', key('stream:' .. version), '>')
  local out = {}
  for _, entry in ipairs(reply and reply[1] and reply[1][2] or {}) do out[#out + 1] = { entry[1], entry[2][2] } end
  return out
end
