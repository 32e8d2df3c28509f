-- recover: moves tasks on whose run is gone, if their lease is still as it was found.
-- KEYS    pending, active, lease, scheduled, retry, archived, completed, due, processed, failed
-- ARGV    prefix, moves[kind, id, score, at, message]
-- RETURNS {number moved, broken {id, error}...}
-- USES    clock, counters, moves
redis.call('DEL', prefix) -- allowed at the memory limit, see pump

-- One without a lease may have been on its way to who waits for it, and be done by now.
local function is_as_found(id, score)
  if (redis.call('ZSCORE', lease, id) or '') ~= score then
    return false
  end
  return score ~= '' or redis.call('LPOS', active, id, 'RANK', -1) ~= false
end

local moved, broken = 0, {}
local move_as = moves_by_kind()
for i = 1, moves_n do
  local row = moves_at + (i - 1) * 5
  local id = ARGV[row + 2]
  local done, problem = pcall(function()
    if is_as_found(id, ARGV[row + 3]) then
      local at = ARGV[row + 4] == 'now' and integer(now_ms) or ARGV[row + 4]
      move_as[ARGV[row + 1]](id, prefix .. 't:' .. id, at, ARGV[row + 5])
      moved = moved + 1
    end
  end)
  if not done then
    broken[#broken + 1] = { id, type(problem) == 'table' and problem.err or tostring(problem) }
  end
end
trim_archive()
count(processed, failed, processed_n, failed_n)
return { moved, broken }
