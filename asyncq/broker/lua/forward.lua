-- forward: moves what is due from scheduled and retry to pending, or to its group.
-- KEYS    pending, scheduled, retry, due, groups
-- ARGV    prefix, limit
-- RETURNS {number moved, unix ms when the next is due or '', unix ms now}
-- USES    types, clock
redis.call('DEL', prefix) -- allowed at the memory limit, see pump
limit = tonumber(limit)
local moved = 0

local function forward(set, id)
  local key = prefix .. 't:' .. id
  local fields = redis.pcall('HMGET', key, 'group', 'msg') -- an error has no fields
  local group, message = fields[1], fields[2]
  redis.call('ZREM', set, id)
  redis.call('ZREM', due, id)
  moved = moved + 1
  if not message then
    return -- its hash is gone: there is nothing to run
  end
  if group and group ~= '' and not wrong_type({ [prefix .. 'g:' .. group] = 'zset' }) then
    redis.call('ZADD', prefix .. 'g:' .. group, integer(now_s), id)
    redis.call('SADD', groups, group)
    redis.call('HSET', key, 'state', 'aggregating')
  else
    redis.call('HSET', key, 'state', 'pending', 'pending_since', now_ns)
    redis.call('LPUSH', pending, id)
  end
end

-- Ours, to the millisecond. An entry counts only while the set still says the same second:
-- Go's tools move tasks without knowing of it.
local exact = redis.call(
  'ZRANGEBYSCORE', due, '-inf', integer(now_ms), 'WITHSCORES', 'LIMIT', 0, limit)
for i = 1, #exact, 2 do
  local id, second = exact[i], math.ceil(tonumber(exact[i + 1]) / 1000)
  if tonumber(redis.call('ZSCORE', scheduled, id) or -1) == second then
    forward(scheduled, id)
  elseif tonumber(redis.call('ZSCORE', retry, id) or -1) == second then
    forward(retry, id)
  else
    redis.call('ZREM', due, id)
  end
end

-- And Go's, to the second.
for _, set in ipairs({ scheduled, retry }) do
  local ids = redis.call(
    'ZRANGEBYSCORE', set, '-inf', integer(now_s), 'LIMIT', 0, math.max(limit - moved, 0))
  for _, id in ipairs(ids) do
    forward(set, id)
  end
end

local next_ms = math.huge
for set, unit_ms in pairs({ [due] = 1, [scheduled] = 1000, [retry] = 1000 }) do
  local first = redis.call('ZRANGE', set, 0, 0, 'WITHSCORES')
  if first[2] then
    next_ms = math.min(next_ms, tonumber(first[2]) * unit_ms)
  end
end
return { moved, next_ms < math.huge and integer(next_ms) or '', integer(now_ms) }
