-- pump: saves the outcomes of runs and takes up to `want` pending tasks, for one queue.
-- KEYS    pending, active, lease, paused, scheduled, retry, archived, completed, due, mark, last,
--         processed, failed
-- ARGV    prefix, sequence, want, done[id, mark], moves[kind, id, mark, at, message, lock, result]
-- RETURNS {now_us, mark, refused ids, broken {id, error}..., ghost ids, ids, messages,
--         1 if more is pending}
-- USES    limits, types, clock, lease, last, counters, moves
-- A write that Redis allows at its memory limit comes first: it lets the rest of the script
-- write too, so that workers drain a Redis that is full.
redis.call('DEL', prefix)

local before = answered_before()
if before then
  return before
end

local refusal = wrong_type({ [pending] = 'list', [active] = 'list', [lease] = 'zset' })
if refusal then
  return refusal
end

local refused, broken = {}, {}

-- Taking comes first: were lease emptied by the saving, it would start again as a small zset,
-- in which every addition compares the scores of all members.
local taken, messages, ghosts = {}, {}, {}
local run_mark, bytes, more = 0, 0, 0
local waiting = 0
if tonumber(want) > 0 and redis.call('EXISTS', paused) == 0 then
  waiting = redis.call('LLEN', pending)
end
if waiting > 0 then
  run_mark = redis.call('INCR', mark) % (MARKS - 1) + 1
  local ids = redis.call('RPOP', pending, want)
  local ends, leases = lease_until(now_s, run_mark), {}
  for i, id in ipairs(ids) do
    if bytes > BATCH_BYTES then
      for j = #ids, i, -1 do -- back to where they were
        redis.call('RPUSH', pending, ids[j])
      end
      break
    end
    local key = prefix .. 't:' .. id
    local message = redis.pcall('HGET', key, 'msg')
    if type(message) == 'string' then
      bytes = bytes + #message
      redis.call('HSET', key, 'state', 'active')
      redis.call('HDEL', key, 'pending_since')
      taken[#taken + 1] = id
      messages[#messages + 1] = message
      leases[#leases + 1] = ends
      leases[#leases + 1] = id
    else -- no hash, or no hash with a message: nothing that could be run
      ghosts[#ghosts + 1] = id
      if not message then
        redis.call('UNLINK', key)
      end
    end
  end
  more = waiting > #taken + #ghosts and 1 or 0
  if #taken > 0 then
    redis.call('LPUSH', active, unpack(taken))
    redis.call('ZADD', lease, unpack(leases))
  end
end

if done_n > 0 then
  local held, hashes = {}, {}
  for i = 1, done_n do
    local id, run = ARGV[done_at + i * 2 - 1], ARGV[done_at + i * 2]
    if held_by(run, id, done_n) then
      held[#held + 1] = id
      hashes[#hashes + 1] = prefix .. 't:' .. id
    else
      refused[#refused + 1] = id
    end
  end
  if #held > 0 then
    redis.call('ZREM', lease, unpack(held))
    redis.call('UNLINK', unpack(hashes))
    leave_active_in_order(held)
    processed_n = processed_n + #held
  end
end

local move_as = moves_n > 0 and moves_by_kind()
for i = 1, moves_n do
  local row = moves_at + (i - 1) * 7
  local id = ARGV[row + 2]
  if holds(redis.call('ZSCORE', lease, id), ARGV[row + 3]) then
    local moved, problem = pcall(
      move_as[ARGV[row + 1]], id, prefix .. 't:' .. id,
      ARGV[row + 4], ARGV[row + 5], ARGV[row + 6], ARGV[row + 7])
    if not moved then
      broken[#broken + 1] = { id, type(problem) == 'table' and problem.err or tostring(problem) }
    end
  else
    refused[#refused + 1] = id
  end
end
if done_n + moves_n > 0 then
  local counted, problem = pcall(function()
    trim_archive()
    count(processed, failed, processed_n, failed_n)
  end)
  if not counted then -- the tasks are where they belong; only what is kept about them is broken
    broken[#broken + 1] = { '', type(problem) == 'table' and problem.err or tostring(problem) }
  end
end

remember(run_mark, refused, broken, taken)
return { now_us, run_mark, refused, broken, ghosts, taken, messages, more }
