"""What Redis holds, as text, in types that redis-py does not tell."""

from __future__ import annotations

from typing import Any, cast

from redis.asyncio import Redis

from asyncq.broker.keys import QueueKeys


async def keys(redis: Redis, pattern: str) -> list[str]:
    """Return the keys that fit a pattern, sorted."""
    found = cast(list[bytes], await redis.keys(pattern))
    return sorted(key.decode() for key in found)


async def scores(redis: Redis, key: str) -> dict[str, float]:
    """Return the members of a zset with their scores."""
    found = cast(list[tuple[bytes, float]], await redis.zrange(key, 0, -1, withscores=True))
    return {member.decode(): score for member, score in found}


async def number(redis: Redis, key: str) -> int:
    """Return a counter; one that is not there is 0."""
    return int(cast(bytes | None, await redis.get(key)) or 0)


async def all_but_leases(redis: Redis, queue: QueueKeys) -> dict[str, Any]:
    """Return all that Go's format holds of a queue, but for the leases, which heartbeats extend."""
    held: dict[str, Any] = {}
    for key in await keys(redis, f"{queue.prefix}*"):
        match cast(bytes, await redis.type(key)):
            case b"hash":
                held[key] = await redis.hgetall(key)
            case b"list":
                held[key] = await redis.lrange(key, 0, -1)
            case b"string":
                held[key] = await redis.get(key)
            case b"zset" if key != queue.lease:
                held[key] = await scores(redis, key)
            case _:
                pass
    return held
