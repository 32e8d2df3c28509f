-- A lease ends at a whole second (Go reads only that); the fraction is the mark of the fetch
-- that took it, in 1/2^20, which a double holds exactly beside today's seconds.
local LEASE_S = 31 -- whole seconds are cut, so at least 30 s remain, Asynq's lease
local MARKS = 1048576

local function lease_until(now, mark) -- now: Redis's own, in seconds
  return string.format('%.17g', now + LEASE_S + mark / MARKS)
end

-- Whether a lease with this score (false: none) belongs to the run with this mark.
local function holds(score, mark)
  if not score then
    return false
  end
  local seconds = tonumber(score)
  return (seconds - math.floor(seconds)) * MARKS == tonumber(mark)
end

-- The same for one of about `n` runs. What one fetch took has one score until it is extended, so
-- from the score of one run the others are found by it: to read a score costs more than a move.
local found_by_mark = {}

local function held_by(mark, id, n)
  local found = found_by_mark[mark]
  if found and found[id] then
    return true
  end
  local score = redis.call('ZSCORE', lease, id)
  if not holds(score, mark) then
    return false
  end
  if not found and n > 1 then
    found = {}
    for _, other in ipairs(redis.call('ZRANGEBYSCORE', lease, score, score, 'LIMIT', 0, n * 2)) do
      found[other] = true
    end
    found_by_mark[mark] = found
  end
  return true
end
