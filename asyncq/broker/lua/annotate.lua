-- annotate: writes a field of a running task's hash, such as its result or progress.
-- KEYS    lease
-- ARGV    task, id, mark, field, value
-- RETURNS 1 written | 0 the lease is no longer held
-- USES    lease
if not holds(redis.call('ZSCORE', lease, id), mark) then
  return 0
end
redis.call('HSET', task, field, value)
return 1
