-- expired: finds tasks whose run is gone: the lease has ended, or there is none.
-- KEYS    active, lease
-- ARGV    prefix, limit
-- RETURNS {id, lease score or '', message or '', state or ''}...
-- USES    limits, clock, lease
-- A lease with a mark was made by Redis's clock and has ended when it says so. One without
-- was made by a Go host's clock, so it gets Asynq's 30 s for skew.
local GRACE_S = 30
limit = tonumber(limit)
local found, bytes = {}, 0

local function report(id, score)
  if bytes > BATCH_BYTES then
    return
  end
  local fields = redis.pcall('HMGET', prefix .. 't:' .. id, 'msg', 'state') -- an error: no hash
  local message, state = fields[1] or '', fields[2] or ''
  bytes = bytes + #message
  found[#found + 1] = { id, score, message, state }
end

local from, page = 0, 0
repeat
  local ended = redis.call(
    'ZRANGEBYSCORE', lease, '-inf', integer(now_s), 'WITHSCORES', 'LIMIT', from, limit)
  for i = 1, #ended, 2 do
    local seconds = tonumber(ended[i + 1])
    if seconds <= now_s - GRACE_S or seconds ~= math.floor(seconds) then
      report(ended[i], ended[i + 1])
    end
  end
  from = from + #ended / 2
  page = page + 1
until #ended == 0 or #found >= limit or page == 10

local function look(first, last)
  local ids = redis.call('LRANGE', active, first, last)
  for i, score in ipairs(redis.call('ZMSCORE', lease, unpack(ids))) do
    if not score then
      report(ids[i], '')
    end
  end
end

-- Fetching and finishing are atomic, in Go too, so an id of active without a lease was on its way
-- to who waited for it, see receive, and is among the youngest, at the head; or it has lost its
-- lease, and is or will be among the oldest, at the tail.
local running = redis.call('LLEN', active)
if running > 0 and #found < limit then
  look(0, limit - 1)
end
for last = running - 1, math.max(limit, running - 9 * limit), -limit do
  if #found >= limit then
    break
  end
  look(math.max(limit, last - limit + 1), last)
end
return found
