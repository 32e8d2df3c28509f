-- expire: deletes completed tasks whose retention has ended.
-- KEYS    completed
-- ARGV    prefix, limit
-- RETURNS the number deleted
-- USES    clock
local ids = redis.call('ZRANGEBYSCORE', completed, '-inf', integer(now_s), 'LIMIT', 0, limit)
for _, id in ipairs(ids) do
  redis.call('UNLINK', prefix .. 't:' .. id)
  redis.call('ZREM', completed, id)
end
return #ids
