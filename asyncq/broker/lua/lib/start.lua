-- Redis 6.2 replicates scripts by their effects only when told; later versions always do.
redis.replicate_commands()
