-- receive: takes the task that BLMOVE put into active in front of this call, if there is one.
-- KEYS    pending, active, lease, paused, mark, last
-- ARGV    prefix, sequence
-- RETURNS {time {s, us}, mark, {}, {}, ghost ids, ids, messages, 1 if more may be pending}
-- USES    lease, last
-- It runs while somebody waits for it, in a Redis that was idle: there each call of Redis and
-- each library takes some 10 µs, so it does without what is not needed for one task.
local time = redis.call('TIME')
local PAGE, PAGES = 100, 10 -- of the youngest in active: others may have been served in this moment

-- What was moved and not yet taken has no lease, and is not called active. If BLMOVE served
-- several clients at once, it does not matter who takes whose.
local id, key, message
local ghosts = {}

local function find(ids)
  for _, one in ipairs(ids) do
    if not redis.call('ZSCORE', lease, one) then
      key = prefix .. 't:' .. one
      local found = redis.pcall('HMGET', key, 'msg', 'state')
      if found[2] ~= 'active' then
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
    end
  end
end

for page = 0, PAGES - 1 do
  local ids = redis.call('LRANGE', active, page * PAGE, (page + 1) * PAGE - 1)
  find(ids)
  if id or #ids < PAGE then
    break
  end
end

if id and redis.call('EXISTS', paused) == 1 then
  redis.call('DEL', prefix) -- allowed at the memory limit, see pump
  redis.call('RPUSH', pending, id) -- first: if it is refused, the task stays where it is
  redis.call('LREM', active, 1, id)
  id = nil
end
if not id then
  return { time, 0, {}, {}, ghosts, {}, {}, 0 }
end

-- First what is allowed at the memory limit, see pump.
redis.call('HDEL', key, 'pending_since')
local run_mark = redis.call('INCR', mark) % (MARKS - 1) + 1
redis.call('HSET', key, 'state', 'active')
redis.call('ZADD', lease, lease_until(time[1], run_mark), id)
remember(run_mark, {}, {}, { id })
return { time, run_mark, {}, {}, ghosts, { id }, { message }, 1 }
