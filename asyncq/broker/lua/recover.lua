-- recover: moves tasks on whose run is gone, if their lease is still as it was found.
-- KEYS    pending, active, lease, scheduled, retry, archived, completed, due, processed, failed
-- ARGV    prefix, moves[kind, id, score, at, message]
-- RETURNS the number moved
-- USES    start, clock, counters, moves
local moved = 0
for i = 1, moves_n do
  local row = moves_at + (i - 1) * 5
  local id, score = ARGV[row + 2], ARGV[row + 3]
  if (redis.call('ZSCORE', lease, id) or '') == score then
    local at = ARGV[row + 4] == 'now' and integer(now_ms) or ARGV[row + 4]
    moves_by_kind[ARGV[row + 1]](id, prefix .. 't:' .. id, at, ARGV[row + 5])
    moved = moved + 1
  end
end
trim_archive()
count(processed, failed, processed_n, failed_n)
return moved
