-- receive: takes the task that BLMOVE put into active in front of this call, if there is one.
-- KEYS    pending, active, lease, paused, mark, last
-- ARGV    prefix, sequence
-- RETURNS {now_us, mark, {}, {}, ghost ids, ids, messages, 1 if more may be pending}
-- USES    lease, last
-- It runs while somebody waits for it, in a Redis that was idle: there each call of Redis and
-- each library takes some 10 µs, so it does without what is not needed for one task.
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local PAGE, LOOKED_AT = 100, 1000 -- of the youngest in active: others may have been served, too

-- What was moved and not yet taken has no lease, and is not called active. If BLMOVE served
-- several clients at once, it does not matter who takes whose.
local id, key, message
local ghosts = {}

local function take(one)
  key = prefix .. 't:' .. one
  local found = redis.pcall('HMGET', key, 'msg', 'state')
  if found[2] == 'active' then
    return
  end
  message = found[1]
  if message then
    id = one
    return
  end
  ghosts[#ghosts + 1] = one -- no hash, or no hash with a message: nothing that could be run
  redis.call('LREM', active, 1, one)
  if not found.err then
    redis.call('UNLINK', key)
  end
end

local seen, page = 0, 1 -- mostly it is the youngest
repeat
  local first = seen - #ghosts -- which have left the list
  local ids = redis.call('LRANGE', active, first, first + page - 1)
  local scores = #ids > 0 and redis.call('ZMSCORE', lease, unpack(ids))
  for i, one in ipairs(ids) do
    if not scores[i] and not id then
      take(one)
    end
  end
  seen = seen + #ids
  local all = #ids < page
  page = PAGE
until id or all or seen > LOOKED_AT

if id and redis.call('EXISTS', paused) == 1 then
  redis.call('DEL', prefix) -- allowed at the memory limit, see pump
  redis.call('RPUSH', pending, id) -- first: if it is refused, the task stays where it is
  redis.call('LREM', active, 1, id)
  id = nil
end
if not id then
  return { now_us, 0, {}, {}, ghosts, {}, {}, 0 }
end

-- First what is allowed at the memory limit, see pump.
redis.call('HDEL', key, 'pending_since')
local run_mark = redis.call('INCR', mark) % (MARKS - 1) + 1
redis.call('HSET', key, 'state', 'active')
redis.call('ZADD', lease, lease_until(time[1], run_mark), id)
remember(run_mark, {}, {}, { id })
return { now_us, run_mark, {}, {}, ghosts, { id }, { message }, 1 }
