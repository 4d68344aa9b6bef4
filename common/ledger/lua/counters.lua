-- A consistent snapshot of a kind's counters. A script rather than a transaction: Redis 7.0 refuses those at maxmemory.
-- ARGV: kind   Returns {{counter, value, ...}, groups in flight}
return { redis.call('HGETALL', key('counts:' .. ARGV[1])), redis.call('SCARD', key('live:' .. ARGV[1])) }
