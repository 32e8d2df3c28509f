-- enqueue: puts new tasks on one queue, each at once, at its time or into its group.
-- KEYS    pending, scheduled, due, groups
-- ARGV    prefix, special, tasks[id, message, extra]
-- RETURNS {row, 'conflict' | 'duplicate' | 'wrongtype', holder or key}... for what was refused
-- USES    types, clock
-- `extra` is '' for a task that is due now, else JSON: at (unix ms), group, lock, lock_s;
-- `special` is how many are not ''.
local kinds = { [pending] = 'list' }
if special ~= '0' then
  kinds[scheduled], kinds[due], kinds[groups] = 'zset', 'zset', 'set'
end
local refusal = wrong_type(kinds)
if refusal then
  return refusal
end
local refused, now_pending = {}, {}

local function add(id, key, message, extra)
  local fields = { 'msg', message, 'state', 'pending' }
  if extra.lock then
    redis.call('SET', extra.lock, id, 'EX', extra.lock_s)
    fields[#fields + 1] = 'unique_key'
    fields[#fields + 1] = extra.lock
  end
  if extra.group then
    fields[#fields + 1] = 'group'
    fields[#fields + 1] = extra.group
  end
  if extra.at then
    fields[4] = 'scheduled'
    redis.call('ZADD', scheduled, integer(math.ceil(extra.at / 1000)), id)
    redis.call('ZADD', due, integer(extra.at), id)
  elseif extra.group then
    fields[4] = 'aggregating'
    redis.call('ZADD', prefix .. 'g:' .. extra.group, integer(now_s), id)
    redis.call('SADD', groups, extra.group)
  else
    fields[#fields + 1] = 'pending_since'
    fields[#fields + 1] = now_ns
    now_pending[#now_pending + 1] = id
  end
  redis.call('HSET', key, unpack(fields))
end

-- Adds a special task, or returns why not.
local function add_special(id, key, message, extra)
  local holder = extra.lock and redis.pcall('GET', extra.lock)
  local exists = redis.call('EXISTS', key) == 1
  -- The lock first, as in Asynq; one that the task itself left behind is its own again.
  if type(holder) == 'table' then
    return 'wrongtype', extra.lock
  elseif holder and (exists or holder ~= id) then
    return 'duplicate', holder
  elseif exists then
    return 'conflict', id
  elseif extra.group and wrong_type({ [prefix .. 'g:' .. extra.group] = 'zset' }) then
    return 'wrongtype', prefix .. 'g:' .. extra.group
  end
  add(id, key, message, extra)
end

for i = 1, tasks_n do
  local row = tasks_at + (i - 1) * 3
  local id, message, extra = ARGV[row + 1], ARGV[row + 2], ARGV[row + 3]
  local key = prefix .. 't:' .. id
  if extra ~= '' then
    local reason, holder = add_special(id, key, message, cjson.decode(extra))
    if reason then
      refused[#refused + 1] = { i, reason, holder }
    end
  elseif redis.call('EXISTS', key) == 1 then
    refused[#refused + 1] = { i, 'conflict', id }
  else
    redis.call('HSET', key, 'msg', message, 'state', 'pending', 'pending_since', now_ns)
    now_pending[#now_pending + 1] = id
  end
end
if #now_pending > 0 then
  redis.call('LPUSH', pending, unpack(now_pending))
end
return refused
