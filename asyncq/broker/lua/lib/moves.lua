-- Where a run's outcome takes its task. Each move starts when the lease is known to be the
-- run's own. It leaves active and lease last: a write that is refused before (somebody made
-- the key another type) leaves the task to its lease, and not in no place at all.
local ARCHIVE_SIZE = 9999 -- what Asynq v0.26.0 leaves of its limit of 10,000
local ARCHIVE_S = 90 * 86400
local TRIM = 1000 -- ids a call, since unpack fails near 8,000

local processed_n, failed_n, archived_n = 0, 0, 0

-- What was taken first mostly ends first, and stands at the tail of active.
local function leave_active(id)
  redis.call('ZREM', lease, id)
  redis.call('LREM', active, -1, id)
end

-- The same for many, whose leases are gone already: what was taken together mostly ends together.
local function leave_active_in_order(ids)
  local oldest, n = redis.call('LRANGE', active, -#ids, -1), 0
  while n < #ids and oldest[#oldest - n] == ids[n + 1] do
    n = n + 1
  end
  redis.call('LTRIM', active, 0, -n - 1)
  for i = n + 1, #ids do
    redis.call('LREM', active, -1, ids[i])
  end
end

local function release(lock, id)
  if lock ~= '' and redis.call('GET', lock) == id then
    redis.call('DEL', lock)
  end
end

-- A due time goes out twice: whole seconds, rounded up, for Asynq, exact milliseconds for us.
local function schedule(set, id, due_ms)
  redis.call('ZADD', due, due_ms, id)
  redis.call('ZADD', set, integer(math.ceil(tonumber(due_ms) / 1000)), id)
end

local function trim_archive()
  if archived_n == 0 then
    return
  end
  local old = redis.call(
    'ZRANGEBYSCORE', archived, '-inf', integer(now_s - ARCHIVE_S), 'LIMIT', 0, TRIM)
  local excess = redis.call('ZCARD', archived) - #old - ARCHIVE_SIZE
  if excess > 0 then
    local last = #old + math.min(excess, TRIM) - 1
    for _, id in ipairs(redis.call('ZRANGE', archived, #old, last)) do
      old[#old + 1] = id
    end
  end
  for _, id in ipairs(old) do
    redis.call('ZREM', archived, id)
    redis.call('UNLINK', prefix .. 't:' .. id)
  end
end

-- A function, since most calls make no such move, and to make the table costs more than a move.
local function moves_by_kind()
  return {
    -- Handled, and nothing of it is kept.
    done = function(id, key, at, message, lock)
      redis.call('UNLINK', key)
      release(lock, id)
      processed_n = processed_n + 1
      leave_active(id)
    end,

    -- Handled, and kept with its result until `at`.
    complete = function(id, key, at, message, lock, result)
      redis.call('ZADD', completed, at, id)
      redis.call('HSET', key, 'msg', message, 'state', 'completed')
      if result ~= '' then
        redis.call('HSET', key, 'result', string.sub(result, 2))
      end
      release(lock, id)
      processed_n = processed_n + 1
      leave_active(id)
    end,

    -- Failed, and to be run again at `at`.
    retry = function(id, key, at, message)
      schedule(retry, id, at)
      redis.call('HSET', key, 'msg', message, 'state', 'retry')
      processed_n = processed_n + 1
      failed_n = failed_n + 1
      leave_active(id)
    end,

    -- The same, but the failure does not count.
    retry_uncounted = function(id, key, at, message)
      schedule(retry, id, at)
      redis.call('HSET', key, 'msg', message, 'state', 'retry')
      leave_active(id)
    end,

    -- Not failed: it asked to be run later.
    snooze = function(id, key, at, message)
      schedule(scheduled, id, at)
      redis.call('HSET', key, 'msg', message, 'state', 'scheduled')
      leave_active(id)
    end,

    -- Failed for good.
    archive = function(id, key, at, message)
      redis.call('ZADD', archived, integer(now_s), id)
      redis.call('HSET', key, 'msg', message, 'state', 'archived')
      processed_n = processed_n + 1
      failed_n = failed_n + 1
      archived_n = archived_n + 1
      leave_active(id)
    end,

    -- What stands in its hash is no message: archived under one that Go can read, with the
    -- bytes that were found kept in `raw`.
    quarantine = function(id, key, at, message)
      redis.call('HSET', key, 'raw', redis.call('HGET', key, 'msg'))
      redis.call('ZADD', archived, integer(now_s), id)
      redis.call('HSET', key, 'msg', message, 'state', 'archived')
      processed_n = processed_n + 1
      failed_n = failed_n + 1
      archived_n = archived_n + 1
      leave_active(id)
    end,

    -- Put back unrun or interrupted: next to be taken, no attempt spent.
    requeue = function(id, key)
      redis.call('HSET', key, 'state', 'pending', 'pending_since', now_ns)
      redis.call('RPUSH', pending, id)
      leave_active(id)
    end,

    -- Its hash is gone, so there is nothing to run or keep.
    forget = function(id, key)
      if redis.pcall('HEXISTS', key, 'msg') == 0 then -- an error: it is no hash
        redis.call('UNLINK', key)
      end
      leave_active(id)
    end,
  }
end
