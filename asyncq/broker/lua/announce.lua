-- announce: writes what a server is and what it runs, for the inspector.
-- KEYS    server, workers
-- ARGV    ttl_s, info, running[id, worker]
-- RETURNS 1
redis.call('DEL', workers) -- allowed at the memory limit, so the rest is too, see pump
redis.call('SET', server, info, 'EX', ttl_s)
for i = 1, running_n do
  redis.call('HSET', workers, ARGV[running_at + i * 2 - 1], ARGV[running_at + i * 2])
end
redis.call('EXPIRE', workers, ttl_s)
return 1
