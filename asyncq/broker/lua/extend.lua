-- extend: extends the leases of runs that still hold them.
-- KEYS    lease
-- ARGV    prefix, runs[id, mark]
-- RETURNS the ids whose lease is no longer held
-- USES    clock, lease
redis.call('DEL', prefix) -- allowed at the memory limit, see pump
local ids, lost, extended = {}, {}, {}
for i = 1, runs_n do
  ids[i] = ARGV[runs_at + i * 2 - 1]
end
local scores = redis.call('ZMSCORE', lease, unpack(ids))
for i, id in ipairs(ids) do
  local mark = ARGV[runs_at + i * 2]
  if holds(scores[i], mark) then
    extended[#extended + 1] = lease_until(now_s, tonumber(mark))
    extended[#extended + 1] = id
  else
    lost[#lost + 1] = id
  end
end
if #extended > 0 then
  redis.call('ZADD', lease, 'XX', 'GT', unpack(extended))
end
return lost
