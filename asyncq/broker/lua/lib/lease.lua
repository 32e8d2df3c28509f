-- A lease ends at a whole second (Go reads only that); the fraction is the mark of the fetch
-- that took it, in 1/2^20, which a double holds exactly beside today's seconds.
local LEASE_S = 31 -- whole seconds are cut, so at least 30 s remain, Asynq's lease
local MARKS = 1048576

local function lease_until(now, mark)
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
