-- The last answer of a hand is kept for a minute: one that is lost on its way is asked for again
-- under the same sequence, and then what it took was taken, and what it saved was saved.
local KEPT_S = 60
local tag = sequence .. ' '

local function remember(run_mark, refused, broken, taken)
  redis.call(
    'SET', last, tag .. cmsgpack.pack({ run_mark, refused, broken, taken }), 'EX', KEPT_S)
end

-- That answer, with the tasks that are still held by its mark, whose leases begin anew: they may be
-- about to end. Nil if this is a new request.
local function answered_before()
  local before = redis.call('GET', last)
  if not before or string.sub(before, 1, #tag) ~= tag then
    return nil
  end
  local run_mark, refused, broken, ids = unpack(cmsgpack.unpack(string.sub(before, #tag + 1)))
  local kept, messages = {}, {}
  for _, id in ipairs(ids) do
    local message = redis.call('HGET', prefix .. 't:' .. id, 'msg')
    if message and holds(redis.call('ZSCORE', lease, id), run_mark) then
      redis.call('ZADD', lease, 'XX', 'GT', lease_until(time[1], run_mark), id)
      kept[#kept + 1] = id
      messages[#messages + 1] = message
    end
  end
  -- 1: whether more is pending is not known any more, so that the queue is asked again.
  return { now_us, run_mark, refused, broken, {}, kept, messages, 1 }
end
